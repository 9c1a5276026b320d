"""If this fails, the report of a hundred nodes fills the screen, or hides the one node with a problem."""

from __future__ import annotations

from qlora_dist.doctor.finding import Finding, merge_findings, worst_finding

OK_FINDING = Finding(check="disk", status="ok", said="90 GiB are free")


def test_equal_findings_are_merged() -> None:
    assert merge_findings({"n1": [OK_FINDING], "n2": [OK_FINDING]}) == [OK_FINDING]


def test_fine_nodes_are_counted_and_faulty_ones_named() -> None:
    full = Finding(check="disk", status="warn", said="1 GiB is free", remedy="tidy up")
    merged = merge_findings(
        {"n1": [OK_FINDING], "n2": [full], "n3": [Finding(check="disk", status="ok", said="70 GiB are free")]}
    )
    assert [(finding.status, finding.said) for finding in merged] == [
        ("ok", "n1: 90 GiB are free; 1 more fine"),
        ("warn", "n2: 1 GiB is free"),
    ]


def test_the_same_fault_everywhere_is_one_line() -> None:
    ill = Finding(check="kernels", status="fail", said="bitsandbytes on cuda: no kernel", remedy="reinstall")
    assert merge_findings({f"n{index}": [ill] for index in range(100)}) == [ill]


def test_many_faulty_nodes_are_counted() -> None:
    ill = Finding(check="kernels", status="fail", said="no kernel", remedy="reinstall")
    found = merge_findings({f"n{index}": [ill if index else OK_FINDING] for index in range(9)})
    assert found[1].said == "n1, n2, n3 and 5 more: no kernel"


def test_a_node_has_the_status_of_its_worst_rank() -> None:
    ill = Finding(check="kernels", status="fail", said="no kernel")
    assert worst_finding([OK_FINDING, ill, OK_FINDING]) == ill
