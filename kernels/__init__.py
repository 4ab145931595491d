"""Triton kernels of the ops; installed as ``trm_fast.kernels``."""

if __name__ == "kernels":
    raise ImportError(
        "this folder is installed as trm_fast.kernels; got an import of `kernels`, which happens "
        "when the checkout itself is on sys.path: start pytest as `pytest`, and python with -P"
    )
