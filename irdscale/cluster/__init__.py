"""Ray: the cluster of a search, and the groups of ranks that run its jobs."""

from irdscale.errors import InputError


def require_ray() -> None:
    """Check that the optional package Ray is installed.

    Raises:
        InputError: it is not.
    """
    try:
        import ray  # noqa: F401
    except ImportError:
        expected = "pip install 'ray[tune]' tensorboardX, or runner: local"
        raise InputError("found ray, but Ray is not installed", expected, key="search.runner") from None
