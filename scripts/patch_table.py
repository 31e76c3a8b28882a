"""Print the tables of supported hosts and of what is patched, in Markdown, from the patch tables.

python scripts/patch_table.py            print them
python scripts/patch_table.py --write    put them into README.md, between the two patch-table markers
python scripts/patch_table.py --check    fail if README.md holds anything else there
"""

import argparse
import sys
from pathlib import Path

from ops_patches.engine import PatchSet
from ops_patches.sglang_moe import SGLANG_MOE
from ops_patches.vllm_lora import VLLM_LORA
from ops_patches.vllm_moe import VLLM_MOE

SETS = {
    "`lora_ops.patch_vllm()`": VLLM_LORA,
    "`moe_ops.patch_vllm()`": VLLM_MOE,
    "`moe_ops.patch_sglang()`": SGLANG_MOE,
}
README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- patch-table:begin -->", "<!-- patch-table:end -->"


def tables() -> str:
    """Both tables."""
    hosts = [
        [door, f"`{name}`", f"`{versions}`"] for door, set_ in SETS.items() for name, versions in set_.hosts.items()
    ]
    patches = [[door, *row] for door, set_ in SETS.items() for row in _patched(set_)]
    return "\n\n".join(
        [
            _table(["Patch", "Host", "Accepted versions"], hosts),
            _table(["Patch", "Patched", "Platform", "Versions", "Why", "Obsolete when"], patches),
        ]
    )


def _patched(set_: PatchSet) -> list[list[str]]:
    """One row for each target; where its signature differs between versions, with all of them."""
    rows: dict[tuple, list[str]] = {}
    for row in set_.patches:
        key = (row.target, row.platform or "any", row.why, row.obsolete_when)
        rows.setdefault(key, []).append(f"`{row.versions}`")
    return [
        [f"`{target}`", platform, ", ".join(versions), why, obsolete]
        for (target, platform, why, obsolete), versions in rows.items()
    ]


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_tables(text: str) -> str:
    """The text with the tables between the markers.

    Raises ValueError unless each marker stands there once, in order.
    """
    if not (text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)):
        raise ValueError(f"there must be one {BEGIN} and after it one {END}")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true", help="update README.md")
    mode.add_argument("--check", action="store_true", help="fail if README.md is out of date")
    args = parser.parse_args()
    if not args.write and not args.check:
        print(tables())
        return 0
    old = README.read_text()
    new = with_tables(old)
    if args.write:
        README.write_text(new)
    elif new != old:
        print("README.md does not show the patch table: run python scripts/patch_table.py --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
