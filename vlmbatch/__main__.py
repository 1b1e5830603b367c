"""`python -m vlmbatch` is the same as `vlmbatch`."""

from vlmbatch.cli import main

if __name__ == "__main__":
    main()
