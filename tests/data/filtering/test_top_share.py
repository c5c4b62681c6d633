from tests.data.signature_rows import pairs, rows
from vila_ops.config.clean import TopShare
from vila_ops.data.filtering.top_share import top_share


def test_coyo_s_selection_keeps_the_best_fifth_of_each_file() -> None:
    """Ten rows in file 0, so two stay; of the equal ones in third place neither; file 1 has no rule."""
    ranks = [0.1, 0.9, 0.5, 0.2, 0.8, 0.8, 0.3, 0.4, 0.0, 0.7]
    signatures = rows(*({"rank": rank} for rank in ranks), {"rank": 0.0, "file": 1})
    drops = top_share(signatures, {0: TopShare(columns=("clip",), share=0.2)})
    assert pairs(drops) == [(number, "below_top_share", None) for number in (0, 2, 3, 5, 6, 7, 8, 9)]


def test_the_share_counts_unclean_records_but_none_without_a_rank() -> None:
    signatures = rows({"rank": 0.9, "is_clean": False}, {"rank": 0.8}, {"rank": 0.7}, {"rank": 0.6}, {"rank": None})
    half = top_share(signatures, {0: TopShare(columns=("clip",), share=0.5)})
    assert half["record"].to_pylist() == [2, 3]


def test_a_share_is_not_off_by_one_for_want_of_binary_fractions() -> None:
    signatures = rows(*({"rank": float(rank)} for rank in range(100)))
    assert len(top_share(signatures, {0: TopShare(columns=("clip",), share=0.29)})) == 71
