"""Adapters that put the fused losses into other libraries' own code, one module for each library.

Each module has a `patch()` and an `unpatch()`, and imports its library when `patch()` is called. `patch()` works as a call and as
the context of a `with` block. A second `patch()` changes nothing, and neither does leaving its block; `unpatch()` restores what was
there before the first. The library's code is replaced for the whole process, all threads included.

Losses and gradients are the library's to rounding. What an adapter saves is kernel launches, and passes over memory where tensors
are large; the loss of a small model on a CPU may take longer than before. `python -m benchmarks.integrations` measures it.

- `fastelbo.integrations.diffusers`: the posterior of the autoencoders of images and of videos
- `fastelbo.integrations.pythae`: the losses of VAE, BetaVAE, DisentangledBetaVAE, IWAE and VAMP
- `fastelbo.integrations.pyro`: KL and log-density of Normals in an ELBO
- `fastelbo.integrations.distributions`: `torch.distributions.kl_divergence` of two Normals
"""
