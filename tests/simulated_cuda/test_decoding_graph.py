"""Generation with CUDA graphs, which the simulated device replays operator by operator."""

from simulated_runs import decode_in_graphs

ROWS = ([3, 6, 4], 40, 24)


def test_graphs_give_the_tokens_of_the_plain_path(one_gpu):
    plain, graphs, broken = (one_gpu.run(decode_in_graphs, how, *ROWS)[0] for how in ("plain", "all", "broken"))
    assert [len(row) for row in plain["tokens"]] == [40, 40, 24]
    assert graphs["tokens"] == broken["tokens"] == plain["tokens"]
    # Plain, a forward a step. With graphs the prompts, 8 steps with three rows and 8 with two, and two forwards
    # for each of the two graphs: to warm up, and to be captured.
    assert (plain["forwards"], graphs["forwards"]) == (40, 21)
    assert plain["said"] == graphs["said"] == []
    assert broken["said"] and all("goes on without a CUDA graph: operation not" in line for line in broken["said"])
