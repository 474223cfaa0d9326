"""What the docs show is what the commands print."""

import sys
from pathlib import Path

import pytest

from prefixquant.pipeline.cli import main

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_scaling_table_is_what_plan_prints(monkeypatch, capsys, tmp_path):
    text = (DOCS / "scaling.md").read_text()
    command = next(line for line in text.splitlines() if line.startswith("`prefixquant plan") and "prints" in line)
    arguments = command.split("`")[1].split()
    monkeypatch.setattr(sys, "argv", [*arguments, "--store", str(tmp_path)])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    shown = text.partition("<!-- scaling -->")[2].partition("<!-- /scaling -->")[0].strip().splitlines()
    assert shown == printed
