"""Starts the command, with this checkout importable as `mnemoc` whatever its folder is called."""

import sys

from . import checkout

if __name__ == "__main__":
    checkout.make_importable()
    if lacking := checkout.missing():
        print(f"benchmarks.gpu needs {', '.join(lacking)}: pip install them", file=sys.stderr)
        sys.exit(2)
    from .main import main

    sys.exit(main(sys.argv[1:]))
