"""python -m timm_senetv2 …: the same as the command timm-senetv2."""

from .commands import main

if __name__ == '__main__':
    main()
