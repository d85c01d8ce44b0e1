"""What the first all-to-all of expert parallelism sends."""


def rows_to_send(chosen: list[list[int]], num_experts: int) -> list[list[int]]:
    """chosen[rank] lists the experts that rank's tokens go to. Returns a table: row r, column s is how many token
    vectors rank r sends to rank s, when the experts are dealt out in equal runs, in order.
    """
    raise NotImplementedError
