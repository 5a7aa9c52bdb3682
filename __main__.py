"""`python -m mnemoc` is `mnemoc`."""

from .cli import main

if __name__ == "__main__":
    main()
