"""The Triton backend, installed as ``fastelbo.kernels``."""

# A well-known distribution owns the top-level name `kernels`, and two copies of these modules under two names would
# compile and cache everything twice: so this directory answers to one name only.
if __name__ != "fastelbo.kernels":
    raise ImportError(
        f"the Triton kernels of fastelbo were imported as {__name__!r}; import them as 'fastelbo.kernels' "
        "(from a source checkout, install it first: python -m pip install -e .)"
    )
