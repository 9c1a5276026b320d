"""`python -m qlora_dist`, as torchrun starts it."""

from qlora_dist.cli.main import main

if __name__ == "__main__":
    main()
