"""Every family of `tests/families.py` against plain Transformers (fp32, CPU); tolerances in `contract.py`."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hpc_rl.checkpoint.export import Export, write_now
from hpc_rl.models.hf import rows as ways
from tests.families import FAMILIES
from tests.models import contract as c
from tests.ranks import run_ranks

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(1500)]  # all families on four ranks
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("families")
    return {name: c.save(base / name, name) for name in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients_are_those_of_transformers(family: str, folders: dict[str, Path]) -> None:
    model, plain = c.build_model(folders[family]), c.reference(folders[family])
    assert type(model.module) is type(plain)
    assert (model.rows is ways.packed) == FAMILIES[family].packed
    for name, expected in plain.named_buffers():
        torch.testing.assert_close(dict(model.module.named_buffers())[name], expected, rtol=0, atol=0)
    rows = c.rows_of(family)
    tokens = c.tokens_of(rows)
    for row in rows:
        ids, positions, keep, targets, media = c.tensors(row)
        logits = model.logits(ids, positions, keep, media)
        everything = torch.cat([c.alone(plain, sequence) for sequence in row])
        assert float((logits - everything[keep]).abs().max()) <= c.TOLERANCE
        loss = c.loss_of(model, row, tokens)
        expected = -everything.log_softmax(-1)[keep, targets].sum() / tokens
        assert abs(float(loss - expected)) <= c.TOLERANCE
        loss.backward()
        expected.backward()
    named = dict(plain.named_parameters())
    for name, parameter in model.module.named_parameters():
        c.same_gradient(name, parameter.grad, named[name].grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_exports_are_what_save_pretrained_writes(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Tensor for tensor, and they load again. Pushes use the same names, whole layers together."""
    model, plain = c.build_model(folders[family]), c.reference(folders[family])
    plain.save_pretrained(tmp_path / "theirs")
    expected = load_file(tmp_path / "theirs" / "model.safetensors")

    buckets = list(model.buckets(max_bytes=200_000))
    assert len(buckets) > 1
    sent = [pair for bucket in buckets for pair in bucket]
    assert sorted(name for name, _ in sent) == sorted(expected) == sorted(model.file_names())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in sent)
    for layer in range(2):
        mark = f"model.layers.{layer}."  # of the text, in most files
        homes = {i for i, bucket in enumerate(buckets) for name, _ in bucket if mark in name}
        assert len(homes) == 1 or family == "qwen3_vl"

    export = Export(tmp_path / "ours", model.folder, None, torch.float32)
    write_now(model, export, tmp_path / "partial")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    again = c.reference(tmp_path / "ours")
    for name, tensor in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def check_sharded(rank: int, _: int, folders: dict[str, str], scratch: str) -> None:
    """Family by family, in four processes: two are FSDP x 2 while the other two are TP x 2; then all are
    HSDP 2 x 2. A family that fails leaves its traceback, and the next one goes on."""
    for family, folder in folders.items():
        base = Path(scratch) / family
        try:
            check_family(rank, family, folder, base)
        except Exception:  # noqa: BLE001 -- the test of this family shows it
            (base / f"failed_{rank}").write_text(traceback.format_exc())


def check_family(rank: int, family: str, folder: str, base: Path) -> None:
    rows, blank, expected = torch.load(base / "expected.pt", weights_only=False)
    half = rank // 2
    if half == 0 or FAMILIES[family].tp:
        spec = c.ParallelSpec(c.CPU, torch.float32, dp_shard=2) if half == 0 else c.TP2
        with c.world(base, f"store{half}", rank % 2, 2):
            c.train_and_compare(folder, spec, rank % 2, rows, blank, expected)
    with c.world(base, "store", rank, 4):
        spec = c.ParallelSpec(c.CPU, torch.float32, dp_replicate=2, dp_shard=2)
        c.train_and_compare(folder, spec, rank, rows, blank, expected)


@pytest.fixture(scope="module")
def sharded(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """One set of ranks for all families that are asked for: starting ranks costs more than a family."""
    asked = [
        item.callspec.params["family"]
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.originalname == "test_fsdp_hsdp_and_tp_equal_one_process"
    ]
    base = tmp_path_factory.mktemp("sharded")
    for family in asked:
        rows, expected = c.rows_of(family), {}
        for name in c.OPTIMIZERS:
            history = c.train(c.build_model(folders[family]), name, rows, c.tokens_of(rows), c.ONE)
            assert history.losses[-1] < history.losses[0] - 0.01
            expected[name] = vars(history)
        (base / family).mkdir()
        blank = c.blank_of(family) if FAMILIES[family].vision else None
        torch.save((rows, blank, expected), base / family / "expected.pt")
    run_ranks(
        check_sharded, 4, base, {f: str(folders[f]) for f in asked}, str(base), group=False, limit_s=900
    )
    return base


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", FAMILIES)
def test_fsdp_hsdp_and_tp_equal_one_process(family: str, sharded: Path) -> None:
    """Losses of five steps with SGD and AdamW, gradient norms, and the gradients of the first step."""
    failed = [file.read_text() for file in sorted((sharded / family).glob("failed_*"))]
    assert not failed, "\n".join(failed)
