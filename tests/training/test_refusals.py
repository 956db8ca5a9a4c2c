"""What `train` refuses, before it reads weights or writes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mtp_spec
import worded
from mtp_spec.errors import MTPSpecError, OptionError
from mtp_spec.training import loop, plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": None}, "give texts, a file of texts, or prompts"),
        ({"prompts": "nowhere.jsonl"}, "no such file"),
        ({"texts": "nowhere.jsonl"}, "no such file"),
        ({"block": "thin"}, "block='thin': allowed are 'dense', 'moe'"),
        ({"start": "shipped", "block": "moe"}, "start='shipped' excludes block"),
        ({"start": "shipped"}, "has no MTP module to go on with"),
        ({"optimiser": "sgd"}, "allowed are 'muon', 'adamw'"),
        ({"depth": 9}, "depth=9"),
        ({"depth": 2, "modules": 3}, "no more modules than that"),
        ({"steps": 0}, "steps=0: an integer of 1 or more"),
        ({"epochs": float("nan")}, "epochs=nan"),
        ({"rate": -1.0}, "rate=-1.0"),
        ({"minutes": 0}, "minutes=0: a number above 0, or None for no limit"),
        ({"start": "middle"}, "allowed are 'random', 'last-layer', 'shipped'"),
        ({"held_out": 0.9}, "held_out=0.9"),
        ({"held_out": "nowhere.jsonl"}, "no such file"),
        ({"temperatures": ()}, "one or more numbers"),
        ({"block": "moe", "width": 8}, "width=8 is of a dense block"),
        ({"loss": "mse"}, "some of ce, kl, tv"),
        ({"max_tokens": 9}, "max_tokens=9: more than check_tokens"),
        ({"colour": "red"}, "colour is no option of training"),
        ({"device": "cuda:9" if not torch.cuda.is_available() else "tpu"}, "device="),
        ({"out": ""}, "give the name of a new folder"),
        ({"texts": 3}, "texts=3: give the name of a file"),
        ({"path": 3}, "path=3: give the name of a folder"),
        ({"progress": 3}, "progress=3: allowed are True, False"),
        ({"loss": 3}, "loss=3: give some of ce, kl, tv"),
        ({"check_temperatures": 0.5}, "check_temperatures=0.5: one or more numbers"),
        ({"held_out": 0.0}, "held_out=0.0: a share above 0"),
        ({"texts": "."}, "texts='.': a folder; give a file"),
        ({"prompts": "/dev/null"}, "prompts='/dev/null': no regular file"),
        ({"out": "a\0b"}, "a folder cannot be made there .*null byte"),
        ({"out": "n" * 300}, "a folder cannot be made there .*too long"),
        ({"seed": 2**64}, "seed is larger than 18446744073709551615"),
        *(
            ({name: 10**9000}, f"{name} is larger than 2147483647")
            for name in ("steps", "width", "batch", "max_tokens")
        ),
        *(
            ({name: 1e300}, rf"{name}=1e\+300: .* at most 1e\+30")
            for name in ("epochs", "rate", "minutes", "decay", "cache_gigabytes")
        ),
        ({"rate": 10**400}, r"rate=1000.* of 401 characters: a number above 0"),
        ({"loss": "kl:1e308,tv:1e308"}, r"loss='kl:1e308,tv:1e308': .* at most 1e\+30"),
        ({"temperatures": (0.0, 1e300)}, r"temperatures=\(0.0, 1e\+300\): .* at most 1e\+30"),
        ({"check_temperatures": (0.0, 0)}, r"check_temperatures=\(0.0, 0\): give each once"),
    ],
)
def test_bad_options_are_named_before_weights_are_read(
    plain: Path, lines: Path, tmp_path: Path, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("mtp_spec.training.run.load")
    given = {"path": plain, "out": tmp_path / "head", "texts": lines, **options}
    with pytest.raises(OptionError, match=message):
        mtp_spec.train(**given)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_overwritten(plain: Path, lines: Path, tmp_path: Path) -> None:
    (tmp_path / "head").mkdir()
    with pytest.raises(OptionError, match="exists: give a new folder"):
        mtp_spec.train(plain, tmp_path / "head", texts=lines, **worded.FEW)


def test_a_link_that_leads_nowhere_is_not_replaced(plain: Path, lines: Path, tmp_path: Path) -> None:
    """`exists` is false for it, but no folder can take its name."""
    (tmp_path / "head").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OptionError, match="exists: give a new folder"):
        mtp_spec.train(plain, tmp_path / "head", texts=lines, **worded.FEW)
    assert [file.name for file in tmp_path.iterdir()] == ["head"]


@pytest.mark.parametrize(
    ("option", "line", "message"),
    [
        ("texts", '{"text": "w1 \\ud83d w2"}', "line 2, cannot be read .half of a surrogate pair"),
        ("texts", '{"text": "w1 w2", "domain": "\\udc00"}', "line 2, cannot be read .half of a surrogate pair"),
        ("prompts", '{"prompt": "\\ud83d"}', "line 2, cannot be read .half of a surrogate pair"),
        (
            "prompts",
            '{"messages": [{"role": "system", "content": "w1"}]}',
            "line 2: none of its messages is the user's",
        ),
        ("held_out", '{"messages": [{"role": "system", "content": "w1"}]}', "line 2: none of its messages"),
    ],
)
def test_a_bad_line_is_named_before_weights_are_read(
    plain: Path, lines: Path, tmp_path: Path, option: str, line: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("mtp_spec.training.run.load")
    file = tmp_path / "lines.jsonl"
    good = "text" if option == "texts" else "prompt"
    file.write_text(f'{{"{good}": "w1 w2 w3"}}\n{line}\n{{"{good}": "w1 \\ud83d\\ude00"}}\n')
    given = {"texts": lines, **worded.FEW, option: file}
    with pytest.raises(OptionError, match=message):
        mtp_spec.train(plain, tmp_path / "head", **given)
    assert [made.name for made in tmp_path.iterdir()] == ["lines.jsonl"]


def test_only_a_folder_of_its_own_is_worked_in(plain: Path, lines: Path, tmp_path: Path) -> None:
    """The folder is deleted at the end, so nobody else's may be taken."""
    own = tmp_path / "head.part" / "notes.txt"
    own.parent.mkdir()
    own.write_text("mine")
    with pytest.raises(OptionError, match=r"head\.part is no folder of a run"):
        mtp_spec.train(plain, tmp_path / "head", texts=lines, **worded.FEW)
    assert [file.name for file in own.parent.iterdir()] == ["notes.txt"]
    with pytest.raises(OptionError, match=r"out='.*/mine': a folder cannot be made there \(.*Not a directory"):
        mtp_spec.train(plain, own / "mine", texts=lines, **worded.FEW)


def test_too_little_to_train_or_to_measure_on(plain: Path, tmp_path: Path) -> None:
    one = worded.texts(tmp_path / "one.jsonl", count=1)
    with pytest.raises(OptionError, match="leaves no text to train on: all 1 are held out; give more"):
        mtp_spec.train(plain, tmp_path / "head", texts=one, **worded.FEW)
    assert not (tmp_path / "head.part").exists()
    short = worded.texts(tmp_path / "short.jsonl", tokens=50)
    with pytest.raises(OptionError, match="no held-out prompt leaves room for check_tokens=8"):
        mtp_spec.train(plain, tmp_path / "other", texts=short, **{**worded.FEW, "max_tokens": 36})


def test_too_little_memory_and_disk_are_said_before_the_start(
    plain: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {**worded.FEW, "width": 10**9}
    with monkeypatch.context() as patch:
        patch.delattr("mtp_spec.training.run.load")
        with pytest.raises(MTPSpecError, match=r"modules of 144,000,.* numbers take .* a smaller width"):
            mtp_spec.train(plain, tmp_path / "head", texts=lines, **wide)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(loop.Trainer, "run", lambda *_: pytest.fail("it started"))
    with monkeypatch.context() as patch:
        free = iter([10**12, 10**5])
        patch.setattr(plan, "free_memory", lambda: next(free))
        with pytest.raises(MTPSpecError, match=r"training takes .* give fewer batch_tokens"):
            mtp_spec.train(plain, tmp_path / "head", texts=lines, **worded.FEW)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(MTPSpecError, match=r"the hidden states take .* of disk"):
        mtp_spec.train(plain, tmp_path / "head", texts=lines, **worded.FEW)
    monkeypatch.setattr(loop.Trainer, "run", lambda *_: pytest.skip("it started"))  # the texts are still there
    monkeypatch.setattr("mtp_spec.training.texts.text_of", lambda *_: pytest.fail("texts are read again"))
    with pytest.raises(pytest.skip.Exception, match="it started"):
        mtp_spec.train(plain, tmp_path / "head", texts=lines, **worded.FEW, cache_gigabytes=0.0)


def test_a_loss_that_is_no_number_ends_the_run(plain: Path, lines: Path, tmp_path: Path) -> None:
    with pytest.raises(MTPSpecError, match="smaller rate"):
        mtp_spec.train(plain, tmp_path / "head", texts=lines, **{**worded.FEW, "rate": 1e30})
