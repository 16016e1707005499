"""`python -m torchreach` is the command `torchreach`."""

from torchreach.app.cli import main

if __name__ == "__main__":
    main()
