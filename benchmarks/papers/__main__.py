"""The command line of the plans."""

import argparse
from collections.abc import Sequence

from record import begin

import lens_unlearn as lu
from benchmarks.papers import __doc__ as what_it_is
from benchmarks.papers import plans


def main(given: Sequence[str] | None = None) -> None:
    """Run one plan, or list all."""
    by_name = {plan.name: plan for plan in plans.PLANS}
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers",
        description=what_it_is,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", nargs="?", choices=list(by_name))
    parser.add_argument("--smoke", action="store_true", help="two cells, to see that it runs")
    args, record = begin(parser, given, module="benchmarks.papers")
    if args.plan is None:
        for plan in plans.PLANS:
            print(f"{plan.name:20} {plan.repeats} [{plan.model}]")
        return
    plan = by_name[args.plan]
    lu.tune_allocator()
    record.about(repeats=plan.repeats, on=plan.model)
    left = record.left("rows")
    table = record.table("rows", plan.columns)
    for number, cell in enumerate(plan.cells()):
        if args.smoke and number == 2:
            break
        key = list(cell.key)
        known = [row for row in left if row[: len(key)] == key]
        table.add(known or [[*key, *rest] for rest in cell.rows()])
    record.end()


if __name__ == "__main__":
    main()
