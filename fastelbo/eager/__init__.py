"""The plain-PyTorch backend: each op as its formula and its slopes, in one file (of likelihoods, one for each family).

On a CPU the memory decides how fast a loss is: fresh pages take longer to fault in than to fill. So these ops allocate the
gradients that they return and work in them, and what else they need is as small as a run of `walk`. Under torch.compile, and on
other devices, the same lines run on whole tensors.
"""

from . import elbo, latent, likelihood, linear

__all__ = ["elbo", "latent", "likelihood", "linear"]
