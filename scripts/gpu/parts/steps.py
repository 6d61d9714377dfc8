"""Training steps of one network at its production shape; see `tests.benchmarks.bench_sbs_gpu`."""

from collections.abc import Iterator

from scripts.gpu.part import Options, main
from tests.benchmarks.bench_sbs_gpu import CASES, ROUNDS, rows_of, tiny
from tests.benchmarks.measure import Row


def rows(options: Options) -> Iterator[Row]:
    """The figures of the network named on the command line."""
    (name,) = options.rest
    case = next(case for case in CASES if case.model == name)
    return rows_of(tiny(case) if options.tiny else case, options.device, 3 if options.tiny else ROUNDS)


if __name__ == "__main__":
    main(rows)
