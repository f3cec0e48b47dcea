"""A recipe that names a file or folder that is not there leaves nothing behind."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlmoe.config import UserError, load_recipe
from vlmoe.study.declare import load_study
from vlmoe.study.run import study
from vlmoe.study.stress import stress
from vlmoe.train.pretrain import pretrain

TEXTS = "data.batch={image: 0, text: 4, pair: 0}"
PAIRS = "data.batch={image: 0, text: 0, pair: 4}"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["init=nowhere"], "nowhere: no such folder"),
        (["branch_from=nowhere/step-5"], "branch_from nowhere/step-5: no such folder"),
        (["data.text_tokenizer={type: hf, path: nowhere.json}"], "nowhere.json: no such file"),
        (["data.text_tokenizer={type: sentencepiece, path: nowhere.spm}"], "nowhere.spm: no such file"),
        (["data.visual_tokenizer.path=nowhere"], "nowhere: no such folder"),
        (["data.sources=[{type: shards, path: nowhere.tar}]", PAIRS], "no file nowhere.tar"),
        (["data.sources=[{type: shards, path: nowhere.tar, read: stream}]", PAIRS], "no file nowhere.tar"),
        (["data.sources=[{type: parquet, path: nowhere.parquet}]", PAIRS], "nowhere.parquet: no such file"),
        (["data.sources=[{type: arrow, path: nowhere}]", PAIRS], "nowhere: no such file"),
        (["data.sources=[{type: folder, path: nowhere}]", PAIRS], "folder nowhere: no such folder"),
        (["data.sources=[{type: folder, kind: text, path: nowhere}]", TEXTS], "folder nowhere: no such folder"),
        (["data.sources=[{type: parquet, path: here.parquet, images: nowhere}]", PAIRS], "images nowhere: no such"),
    ],
)
def test_nothing_is_made_for_a_path_that_leads_nowhere(
    overrides: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"text": ["a"]}), "here.parquet")
    with pytest.raises(UserError, match=said):
        pretrain(load_recipe("demo", ["run.dir=run", *overrides]))
    assert [path.name for path in tmp_path.iterdir()] == ["here.parquet"]


def test_stress_and_studies_likewise(tmp_path: Path) -> None:
    path = "data.text_tokenizer={type: hf, path: nowhere.json}"
    with pytest.raises(UserError, match=r"nowhere.json: no such file"):
        stress(load_recipe("demo", [path]), tmp_path / "stress")
    with pytest.raises(UserError, match=r"nowhere.json: no such file"):
        study(load_study("icons", [f"set=['{path}']"]), tmp_path / "study")
    assert not [*tmp_path.iterdir()]
