"""Our runs as subjects: rows in order, factors, losses, and sites that see and change what the layers do."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.interpret.world import batch_of, tiny
from tests.tasks import world as tasks
from vlmoe.config import UserError
from vlmoe.data.batch import IGNORE
from vlmoe.data.downstream.loader import EvalData, open_split
from vlmoe.interpret import coding
from vlmoe.interpret.own import OwnSubject
from vlmoe.interpret.sites import Choice
from vlmoe.tasks.export import Finetuned, Pretrained
from vlmoe.tasks.registry import collate_of


@pytest.fixture(scope="module")
def trained() -> Pretrained:
    return tiny()


@pytest.fixture(scope="module")
def subject(trained: Pretrained) -> OwnSubject:
    return OwnSubject(trained)


def test_rows_of_a_pair(subject: OwnSubject, trained: Pretrained) -> None:
    batch = batch_of(trained, n=3)
    assert batch.text_BT is not None and batch.valid_BT is not None and batch.target_BT is not None
    assert batch.patch_mask_BP is not None
    table, T = subject.tokens(batch), batch.text_BT.shape[1]
    assert (table.kind, table.samples) == ("pair", batch.keys)
    rows = 17 + T
    assert table.sample_R.tolist() == [b for b in range(3) for _ in range(rows)]
    assert table.modality_R.tolist() == (["vision"] * 17 + ["text"] * T) * 3
    assert table.position_R.tolist() == [*range(-1, 16), *range(T)] * 3
    assert table.valid_R.reshape(3, rows)[:, 17:].tolist() == batch.valid_BT.tolist()
    assert table.valid_R.reshape(3, rows)[:, :17].all()
    colour = table.factors["colour"].reshape(3, rows)
    place, hidden = table.factors["place"].reshape(3, rows), table.factors["hidden"].reshape(3, rows)
    for b in range(3):
        nothing = [""] * T
        assert colour[b].tolist() == [
            "",
            *batch.patch_factors[b]["colour"],
            *batch.token_factors[b].get("colour", nothing),
        ]
        assert place[b].tolist() == [""] * 17 + batch.token_factors[b].get("place", nothing)
        said = ["hidden" if h else "shown" for h in batch.patch_mask_BP[b]]
        said += ["shown" if t == IGNORE else "hidden" for t in batch.target_BT[b]]
        assert hidden[b].tolist() == ["", *said]


def test_hidden_words_are_shown_as_they_are(subject: OwnSubject, trained: Pretrained) -> None:
    batch = batch_of(trained, "text", n=2)
    assert batch.text_BT is not None and batch.target_BT is not None
    words = subject.tokens(batch).text_R.reshape(2, -1)
    ids_BT = torch.where(batch.target_BT == IGNORE, batch.text_BT, batch.target_BT)
    assert words[0, 0] == "<start>"
    assert words[1, 1] == trained.text_tokenizer.decode([int(ids_BT[1, 1])])
    assert "[MASK]" not in words


def test_the_same_numbers_after_they_were_given_anew(trained: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "MOST", 5)
    forgetful, subject = OwnSubject(trained), OwnSubject(trained)
    for start in (0, 4, 0):
        batch = batch_of(trained, start=start, n=4)
        a, b = forgetful.tokens(batch).factors, subject.tokens(batch).factors
        assert list(a) == list(b)
        assert all((a[name] == b[name]).all() for name in a)


def test_losses_are_those_of_training(subject: OwnSubject, trained: Pretrained) -> None:
    for kind in ("pair", "image", "text"):
        batch = batch_of(trained, kind)
        loss_R, table = subject.losses(batch), subject.tokens(batch)
        assert (np.isfinite(loss_R) == (table.factors["hidden"] == "hidden")).all()
        with torch.no_grad():
            wanted = trained.model.losses(batch)
        for name, modality in (("mim", "vision"), ("mlm", "text")):
            if name in wanted:
                found = loss_R[(table.modality_R == modality) & np.isfinite(loss_R)]
                assert len(found) == wanted[name].count
                assert found.mean() == pytest.approx(float(wanted[name].mean), rel=1e-5)


def test_sites_see_what_the_layers_report(subject: OwnSubject, trained: Pretrained) -> None:
    assert [s.name for s in subject.sites] == list(trained.model.backbone.routed_layers())
    first = subject.sites[0]
    assert (first.layer, first.modality, first.experts, first.k) == (1, "vision", 4, 2)
    seen: dict[str, Choice] = {}
    handles = [s.watch(lambda c, name=s.name: seen.__setitem__(name, c)) for s in subject.sites]  # type: ignore[misc]
    batch = batch_of(trained)
    stats = subject.run(batch)[0].stats
    assert set(seen) == set(stats) == {"1/vision", "1/text"}  # the top block serves pairs by a dense layer
    table = subject.tokens(batch)
    for site in subject.sites:
        if site.name in seen:
            c, s = seen[site.name], stats[site.name]
            assert torch.equal(c.expert_NK, s.expert_index_NK) and torch.equal(c.gate_NK, s.gate_NK)
            assert c.kept_NK[:, 0].tolist() == table.valid_R[table.rows_of(site)].tolist()
            top = c.probs_NE.topk(2, dim=1)
            assert torch.equal(top.indices, c.expert_NK)
            torch.testing.assert_close(top.values / top.values.sum(dim=1, keepdim=True), c.gate_NK)
    for handle in handles:
        handle.remove()
    seen.clear()
    subject.run(batch)
    assert not seen


def test_a_gate_of_zero_takes_an_experts_part_away(subject: OwnSubject, trained: Pretrained) -> None:
    site, batch = next(s for s in subject.sites if s.name == "1/text"), batch_of(trained)
    layer = trained.model.backbone.routed_layers()["1/text"]
    outputs: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _, __, out: outputs.append(out[0]))
    with site.change(lambda c: replace(c, gate_NK=torch.zeros_like(c.gate_NK))):
        subject.run(batch)
    subject.run(batch)
    handle.remove()
    assert outputs[0].abs().max() == 0
    assert outputs[1].abs().max() > 0


def test_soft_routing_is_left_out_and_said_so() -> None:
    subject = OwnSubject(tiny("model.vision.router.type=soft", "model.text.router.type=expert_choice"))
    assert [s.name for s in subject.sites] == ["1/text", "3/text"]
    assert any("soft routing" in note and "1/vision" in note for note in subject.notes)
    assert any("experts choose tokens" in note for note in subject.notes)


def test_what_is_no_batch(subject: OwnSubject, trained: Pretrained) -> None:
    with pytest.raises(UserError, match="expected a Batch, or a Step or dictionary of them, got list"):
        subject.run([1])
    both = {"pair": batch_of(trained, n=2), "text": batch_of(trained, "text", n=2)}
    with pytest.raises(UserError, match="one kind of batch at a time, got pair, text"):
        subject.tokens(both)


# ----------------------------------------------------------------------------------------------------------- fine-tuned
def finetuned(task: str) -> tuple[OwnSubject, EvalData]:
    from pathlib import Path

    plan = tasks.recipe(task)
    model, words = tasks.built(plan)
    examples = open_split(plan, "val", model.labels or None)
    data = EvalData(examples, collate_of(plan, model.labels, words), 8, 4)
    return OwnSubject(Finetuned(model, words, plan, model.labels, Path(task))), data


def test_a_classifiers_loss_stands_at_the_first_token() -> None:
    subject, data = finetuned("vqa")
    step = data[0]
    table, loss_R = subject.tokens(step), subject.losses(step)
    assert np.isfinite(loss_R).sum() == 4
    assert (table.position_R[np.isfinite(loss_R)] == -1).all()
    with torch.no_grad():
        whole = subject.trained.model(step.batches).metrics["vqa/loss"]
    assert loss_R[np.isfinite(loss_R)].mean() == pytest.approx(float(whole), rel=1e-5)
    assert set(table.factors["task"]) == {"vqa"}
    name = next(iter(step.examples[0].factors))
    for b, example in enumerate(step.examples):
        assert set(table.factors[name][table.sample_R == b]) == {example.factors[name]}


def test_two_passes_are_one_table_in_their_order() -> None:
    subject, data = finetuned("nlvr2")
    step = data[0]
    table = subject.tokens(step)
    assert table.samples[:1] + table.samples[4:5] == [f"{step.examples[0].key}/left", f"{step.examples[0].key}/right"]
    assert np.isfinite(subject.losses(step)).sum() == 4
    counts: dict[str, int] = {}

    def count(name: str, choice: Choice) -> None:
        counts[name] = counts.get(name, 0) + len(choice.expert_NK)

    for site in subject.sites:
        site.watch(lambda c, name=site.name: count(name, c))  # type: ignore[misc]
    subject.run(step)
    for site in subject.sites:
        assert counts.get(site.name, 0) in (0, len(table.rows_of(site)))


def test_captions_of_one_image_have_names_of_their_own_and_no_loss_of_their_own() -> None:
    subject, data = finetuned("retrieval")
    samples = subject.tokens(data[0]).samples
    assert len(set(samples)) == len(samples)
    with pytest.raises(UserError, match="retrieval has no loss of single examples"):
        subject.losses(data[0])
