"""`python -m irdscale`: the same as the `irdscale` command."""

from irdscale.cli import main

if __name__ == "__main__":
    main()
