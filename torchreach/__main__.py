"""`python -m torchreach` is the command `torchreach`."""

from torchreach.cli import main

if __name__ == "__main__":
    main()
