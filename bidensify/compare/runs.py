"""TBD."""


class RunRecord: ...


def read_run() -> None: ...
