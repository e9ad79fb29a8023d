"""`python -m unigen_fast info [--ops | --models] | demo | bench`, also installed as `unigen-fast`."""

import sys


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    command, rest = (arguments[0], arguments[1:]) if arguments else ("info", [])
    if command == "info" and rest == ["--ops"]:
        from unigen_fast import _coverage, info

        print(_coverage.table(info().backends))
        return 0
    if command == "info" and rest == ["--models"]:
        from unigen_fast import models

        print(models.table())
        return 0
    if command == "info":
        import unigen_fast

        print(unigen_fast.info())
        return 0
    if command == "demo":
        from unigen_fast import demo

        return demo.main(rest) or 0
    if command == "bench":
        from unigen_fast import bench

        return bench.main(rest) or 0
    usage = "usage: python -m unigen_fast [info [--ops | --models] | demo | bench] …"
    print(f"{usage}\nunknown command {command!r}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
