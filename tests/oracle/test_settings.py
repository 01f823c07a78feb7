"""What oracle.json holds is what the schema page says."""

from __future__ import annotations

from pathlib import Path

from tribunal.oracle.settings import OracleFacts


def test_every_field_of_oracle_json_is_in_the_schema_page():
    page = (Path(__file__).parents[2] / "docs" / "files.md").read_text()
    described = page.partition("`oracle.json`:")[2].partition("`metrics.jsonl`")[0]
    assert [field for field in OracleFacts.model_fields if f"`{field}`" not in described] == ["schema_version"]
