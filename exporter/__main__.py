"""``python -m sam3x``."""

from sam3x.cli.app import main

if __name__ == "__main__":
    main()
