"""`python -m linattn` is the `linattn` command."""

from linattn.cli import main

if __name__ == "__main__":
    main()
