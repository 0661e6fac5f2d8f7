"""``python -m sam3x``."""

from sam3x.cli import main

if __name__ == "__main__":
    main()
