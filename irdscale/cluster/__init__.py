"""Ray: the cluster that a search runs on, and the groups of ranks that work on it."""

from irdscale.errors import InputError


def require_ray() -> None:
    """Check that Ray, which comes with an extra, is here.

    Raises:
        InputError: it is not installed.
    """
    try:
        import ray  # noqa: F401
    except ImportError:
        raise InputError(
            "search.runner: found ray, but Ray is not installed; expected pip install 'irdscale[ray]', or runner: local"
        ) from None
