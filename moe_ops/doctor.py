"""python -m moe_ops.doctor [--json]: the same as python -m lora_ops.doctor, which examines the patches of both."""

import sys

from lora_ops.doctor import main

if __name__ == "__main__":
    sys.exit(main("moe_ops.doctor"))
