"""`python -m vlmoe`, for launchers that start modules: torchrun --nproc-per-node 2 -m vlmoe pretrain demo"""

from vlmoe.cli import main

if __name__ == "__main__":
    main()
