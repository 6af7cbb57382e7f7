"""The `toolkit` command on a real run: generate, evaluate, export, verify, audit, plan, verify-resume."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import fsspec
import pytest
import torch
from accelerate.state import AcceleratorState

from recipes.train_demo import CONFIG as DEMO
from tests.support import ROOT, change, environment, flags, toolkit
from toolkit.cli import main
from toolkit.config import TrainConfig
from toolkit.data import remote
from toolkit.data.tokenizer import load_tokenizer, write_transformers_files
from toolkit.errors import UserError
from toolkit.training import checkpoint, resume_worker
from toolkit.training import trainer as trainer_module
from toolkit.training.trainer import STATE_PARTS, StepResult, Trainer
from toolkit.training.verify_resume import compare_runs, compare_states, verify_resume


@pytest.fixture
def run(fit: Callable[[TrainConfig], Path], tiny: TrainConfig) -> Path:
    """A finished run of a few steps."""
    return fit(change(tiny, training={"max_steps": 4, "sample_every": None}))


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a verb prints."""
    capsys.readouterr()
    main(arguments)
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a verb refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    return next(line for line in lines if line.startswith("error: "))


def test_after_an_error_ctrl_c_is_what_it_was_until_the_process_ends(capsys: pytest.CaptureFixture[str]) -> None:
    """In a notebook the interpreter goes on; at its end a program is cleared up without a traceback."""
    before = signal.getsignal(signal.SIGINT)
    refusal(capsys, "verify", "nowhere")
    assert signal.getsignal(signal.SIGINT) == before
    code = """
import atexit, signal, sys
signal.signal(signal.SIGINT, getattr(signal, sys.argv[1]))

@atexit.register
def clear_up():
    print("ending", flush=True)
    sys.stdin.readline()
    print("ended")

from toolkit.cli import main
main(["verify", "nowhere"])
"""
    for handler, status, out in (("default_int_handler", -signal.SIGINT, ""), ("SIG_IGN", 1, "ended\n")):
        process = subprocess.Popen(
            [sys.executable, "-c", code, handler],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ending\n"
        process.send_signal(signal.SIGINT)
        said = process.communicate("\n", timeout=60)
        assert (process.returncode, said[0], said[1].count("\n")) == (status, out, 1)


def test_generate_continues_the_prompt_and_repeats_with_a_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = call(capsys, "generate", str(run), "the quick", "--max-new-tokens", "20", "--seed", "3")
    assert first.startswith("the quick")
    assert first == call(capsys, "generate", str(run), "the quick", "--max-new-tokens", "20", "--seed", "3")
    assert first != call(capsys, "generate", str(run), "the quick", "--max-new-tokens", "20", "--seed", "4")
    several = call(
        capsys, "generate", str(run), "a", "--num-samples", "2", "--max-new-tokens", "5", "--temperature", "0"
    )
    assert several.count("--- sample") == 2
    assert "temperature=-1.0 must be at least 0" in refusal(capsys, "generate", str(run), "a", "--temperature", "-1")
    assert "seed=-1 must be at least 0" in refusal(capsys, "generate", str(run), "a", "--seed", "-1")
    assert "--device meta is not usable here" in refusal(capsys, "generate", str(run), "a", "--device", "meta")


def test_evaluate_prints_the_run_s_own_validation_loss(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "loss/val" in row][-1]
    printed = call(capsys, "evaluate", str(run))
    assert f"{last['loss/val']:.5f}" in printed
    assert f"{last['bits_per_byte/val']:.5f}" in printed
    assert "perplexity" in printed


def test_an_exported_model_is_evaluated_like_the_checkpoint_that_it_came_from(
    run: Path, tiny: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where its tokenizer is bytes, whose file says BPE as every tokenizer.json does."""
    exported = str(tmp_path / "exported")
    call(capsys, "export", str(run), exported)
    ways = ["--data.path", *tiny.data.path, "--sequence-length", str(tiny.data.sequence_length), "--max-tokens", "512"]
    assert call(capsys, "evaluate", exported, *ways) == call(capsys, "evaluate", str(run), *ways)
    said = f"error: {exported} is an exported model, which names no hashes; verify the checkpoint that it was made from"
    assert refusal(capsys, "verify", exported) == said


def test_a_model_without_its_tokenizer_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = tmp_path / "exported"
    call(capsys, "export", str(run), str(exported))
    (exported / "tokenizer.json").unlink()
    said = "has a model of 257 ids and no tokenizer.json, which stands for GPT-2 with 50257; put the model's own"
    assert said in refusal(capsys, "generate", str(exported), "x")


def test_a_model_whose_vocabulary_is_padded_is_used_with_its_tokenizer(
    tiny: TrainConfig, fit: Callable[[TrainConfig], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As others write them: 50304 ids for GPT-2's 50257. Here all but the padding is as good as impossible."""
    import transformers

    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 32}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=320, **shape))
    theirs.transformer.wte.weight.data[257:] *= 100
    padded = tmp_path / "padded"
    theirs.save_pretrained(padded)
    write_transformers_files(load_tokenizer("bytes"), padded)
    assert len(call(capsys, "generate", str(padded), "x", "--max-new-tokens", "9", "--temperature", "5")) > 1
    assert "bits per byte" in call(capsys, "evaluate", str(padded), "--data.path", *tiny.data.path)
    config = change(tiny, model={"n_layer": 1, "init_from": str(padded)}, training={"max_steps": 1})
    tensors = checkpoint.load(fit(config) / "checkpoints" / "step-00000001").model
    assert tensors["wte.weight"].shape == (257, 32)
    assert torch.allclose(tensors["wte.weight"], theirs.transformer.wte.weight[:257], atol=0.1)
    theirs.transformer.wte.weight.data[3, 3] = torch.nan
    theirs.save_pretrained(padded)
    said = f"error: {padded}/model.safetensors: transformer.wte.weight has values that are no finite numbers"
    assert said in refusal(capsys, "generate", str(padded), "x")


def test_a_model_without_tokenizer_json_is_gpt2s_only_where_nothing_speaks_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    def model(vocab_size: int) -> None:
        shape = {"n_layer": 1, "n_head": 2, "n_embd": 4, "n_positions": 32}
        transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=vocab_size, **shape)).save_pretrained(folder)

    def generates() -> bool:
        return len(call(capsys, "generate", str(folder), "x", "--max-new-tokens", "2")) > 2

    folder = tmp_path / "theirs"
    model(50304)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config, encoding="utf-8-sig")  # as some editors save it
    assert generates()
    for ids in (50258, 50265, 50368):
        model(ids)
        assert f"has a model of {ids} ids and no tokenizer.json" in refusal(capsys, "generate", str(folder), "x")
    model(50257)
    write_transformers_files(load_tokenizer("gpt2"), folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    assert generates()
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {"in": vocabulary["on"], "on": vocabulary["in"]}))
    said = f"error: {folder} has a tokenizer of another form (vocab.json) and no tokenizer.json; write one there with"
    assert refusal(capsys, "generate", str(folder), "x").startswith(said)
    (folder / "vocab.json").write_text("[")
    assert refusal(capsys, "evaluate", str(folder), "--data.path", "data/any").startswith(said)
    (folder / "vocab.json").rename(folder / "spiece.model")
    assert refusal(capsys, "generate", str(folder), "x").startswith(said.replace("vocab.json", "spiece.model"))


@pytest.mark.parametrize("flag", ["--micro-batch-size", "--max-tokens", "--sequence-length"])
def test_evaluate_refuses_numbers_below_one(run: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    for value in ("0", "-5"):
        assert refusal(capsys, "evaluate", str(run), flag, value) == f"error: {flag} {value} must be at least 1"


def test_a_named_checkpoint_is_checked_before_it_is_used(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run / "checkpoints" / "step-00000004"
    damaged = tmp_path / "damaged"

    def refusals() -> list[str]:
        verbs = (
            ["export", str(damaged), str(tmp_path / "out")],
            ["evaluate", str(damaged)],
            ["generate", str(damaged), "a"],
        )
        return [refusal(capsys, *arguments) for arguments in verbs]

    shutil.copytree(whole, damaged)
    weights = bytearray((damaged / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (damaged / "model.safetensors").write_bytes(weights)
    assert all("model.safetensors" in line and "use another checkpoint" in line for line in refusals())
    (damaged / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes())
    (damaged / "state.json").unlink()
    assert all("state.json" in line for line in refusals())
    shutil.copy(whole / "state.json", damaged)
    for text in (b"{", b"{}", b"[]", b"\xff\xfe"):
        (damaged / "manifest.json").write_bytes(text)
        assert all("manifest.json" in line for line in refusals())
    assert not (tmp_path / "out").exists()


def test_export_is_what_transformers_pipelines_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    out = tmp_path / "exported"
    call(capsys, "export", str(run), str(out))
    pipeline = transformers.pipeline("text-generation", model=str(out))
    text = pipeline("the quick", max_new_tokens=12, do_sample=False)[0]["generated_text"]
    assert text.startswith("the quick")
    assert (
        call(capsys, "generate", str(out), "the quick", "--max-new-tokens", "12", "--temperature", "0") == text + "\n"
    )
    checkpoint_folder = run / "checkpoints" / "step-00000004"
    model, report = transformers.GPT2LMHeadModel.from_pretrained(checkpoint_folder, output_loading_info=True)
    assert model.num_parameters() == 34_720
    assert not any(report.values())
    assert "already exists" in refusal(capsys, "export", str(run), str(out))


def test_verify_checks_runs_checkpoints_and_data(
    run: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = call(capsys, "verify", str(run))
    assert both.count(": ok") == 2
    assert call(capsys, "verify", str(run / "checkpoints")) == both
    assert call(capsys, "verify", str(run / "checkpoints" / "step-00000004")) in both
    assert "ok" in call(capsys, "verify", str(data_dir))
    weights = run / "checkpoints" / "step-00000004" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    assert "1 of 2 damaged: step-00000004" in refusal(capsys, "verify", str(run))
    copy = tmp_path / "copy"
    shutil.copytree(data_dir, copy)
    shard = copy / "train_000000.bin"
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(content)
    assert "train_000000.bin" in refusal(capsys, "verify", str(copy))
    assert "there is no folder" in refusal(capsys, "verify", str(tmp_path / "nothing"))
    (tmp_path / "run.lock").touch()
    assert f"error: {tmp_path} has no checkpoint yet; train until" in refusal(capsys, "verify", str(tmp_path))


def test_audit_proves_or_names_the_step(
    run: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "once per epoch" in call(capsys, "audit", str(run))
    recorded = json.loads((run / "run.json").read_text())
    recorded["starts"].append({"time": "later", "resumed_from": 2, "last_logged_step": 4})
    (run / "run.json").write_text(json.dumps(recorded))
    assert "start 2 (later) did steps 3 to 4 again after a crash" in call(capsys, "audit", str(run))
    (run / ".rows.crc32").unlink()  # whoever falsifies a ledger removes its checksums too
    ledger = run / "ledger.jsonl"
    original = ledger.read_text()
    lines = [json.loads(line) for line in original.splitlines()]
    lines[2]["digest"] = f"{int(lines[2]['digest'], 16) ^ 1:016x}"
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "step 3 was trained on other ids" in refusal(capsys, "audit", str(run))
    ledger.write_text("".join(original.splitlines(keepends=True)[1:]))
    assert "ledger.jsonl begins with step 2 instead of 1" in refusal(capsys, "audit", str(run))
    ledger.write_text("".join(original.splitlines(keepends=True)[:3]))
    assert "ledger.jsonl ends with step 3, but there is a checkpoint of step 4" in refusal(capsys, "audit", str(run))
    ledger.unlink()
    assert "ledger.jsonl ends with step 0, but there is a checkpoint of step 4" in refusal(capsys, "audit", str(run))
    ledger.write_text("x" + original)
    assert "ledger.jsonl has 1 damaged lines (the first is line 1)" in refusal(capsys, "audit", str(run))
    ledger.write_text("".join(original.splitlines(keepends=True)[i] for i in (0, 2, 3)))
    assert "goes from step 1 to step 3" in refusal(capsys, "audit", str(run))
    repeated = [json.loads(line) for line in original.splitlines()]
    for field in ("first_sample", "end_sample", "digest"):
        repeated[3][field] = repeated[2][field]
    ledger.write_text("".join(json.dumps(line) + "\n" for line in repeated))
    refused = refusal(capsys, "audit", str(run))
    assert "step 4 starts at sample 16 instead of 24" in refused
    assert "twice in epoch 1" in refused


def test_evaluate_and_audit_use_the_cache_of_the_recipe(
    fit: Callable[[TrainConfig], Path],
    tiny: TrainConfig,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fsspec.filesystem("memory").put(f"{data_dir}/", "/cli/set/", recursive=True)
    far = {"path": ("memory://cli/set",), "cache_dir": str(tmp_path / "cache"), "cache_gib": 3.0}
    run = fit(change(tiny, data=far, training={"max_steps": 2, "sample_every": None}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert "bits per byte" in call(capsys, "evaluate", str(run))
    assert "once per epoch" in call(capsys, "audit", str(run))
    assert not (tmp_path / "elsewhere").exists()
    limits: list[float] = []
    cache = remote.ShardCache.__init__

    def note_limit(self: remote.ShardCache, folder: Path, *, limit_bytes: int) -> None:
        limits.append(limit_bytes / 2**30)
        cache(self, folder, limit_bytes=limit_bytes)

    monkeypatch.setattr(remote.ShardCache, "__init__", note_limit)
    for verb in ("evaluate", "audit"):
        call(capsys, verb, str(run))
    assert limits == [3.0, 3.0]


def test_plan_takes_a_recipe_a_device_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "recipes" / "train_124m.py")
    printed = call(capsys, "plan", recipe, "--device", "rtx3060")
    assert "124,439,808 parameters" in printed
    assert "16 windows x 1024 tokens x 32 accumulation steps" in printed
    larger = json.loads(call(capsys, "plan", recipe, "--device", "a100", "--json", "--model.size", "355M"))
    assert larger["num_parameters"] == 354_823_168
    assert "rtx3060" in refusal(capsys, "plan", recipe, "--device", "abacus")
    assert "neither a recipe file nor a run folder" in refusal(capsys, "plan", "missing.py")


def test_a_recipe_that_does_not_run_is_told_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    for text, said in (
        ("import nothere", "ModuleNotFoundError: No module named 'nothere'; it has to run by itself and define CONFIG"),
        ("raise ValueError('two\\nlines')", "mine.py cannot be read as a recipe: ValueError: two lines; it has to run"),
        ("x = (", "SyntaxError: '(' was never closed"),
        (
            "raise SystemExit(0)",
            "mine.py ends the program where its numbers are read; its CONFIG has to stand outside of",
        ),
        ("from toolkit.config import GPT2Config; GPT2Config(n_layer=0)", "error: model.n_layer=0 must be above 0"),
    ):
        recipe.write_text(text)
        assert said in refusal(capsys, "plan", str(recipe))
        assert str(tmp_path) not in sys.path
    assert "is not a run folder (it has no recipe.json)" in refusal(capsys, "plan", str(tmp_path))


def test_a_recipe_finds_modules_beside_it_as_a_program_would(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "numbers_of_mine.py").write_text("from toolkit.config import TrainConfig\nCONFIG = TrainConfig()")
    (tmp_path / "mine.py").write_text("import sys\nfrom numbers_of_mine import CONFIG\nsys.path.pop(0)")
    before = list(sys.path)
    assert "124,439,808 parameters" in call(capsys, "plan", str(tmp_path / "mine.py"), "--device", "a100")
    assert sys.path == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prepare", "", "--out", "somewhere"], "an argument after prepare is empty; name a path"),
        (["prepare", "stdlib", "--out", ""], "an argument after --out is empty"),
        (["prepare", "stdlib", "--out="], "an argument --out= is empty"),
        (["verify", ""], "an argument after verify is empty"),
        (["generate", "", "prompt"], "an argument after generate is empty"),
        (["plan", "--data.path", ""], "an argument after --data.path is empty"),
        (["plan", "--run.dir="], "an argument --run.dir= is empty"),
    ],
)
def test_an_empty_path_is_refused_and_does_not_mean_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refusal(capsys, *arguments)
    assert not any(tmp_path.iterdir())


def test_a_prompt_may_be_empty(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "generate", str(run), "", "--max-new-tokens", "3")
    for prompt in (["--sampling.prompt", ""], ["--sampling.prompt="], ["--sampling.prompt=x ="]):
        assert "124,439,808 parameters" in call(capsys, "plan", "--device", "a100", *prompt)
    url = "https://host/x?sig=abc="  # ends in = and is not empty
    assert "124,439,808 parameters" in call(capsys, "plan", "--device", "a100", f"--data.path={url}")


def test_paths_that_are_something_else_are_told_what_they_are(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = run / "checkpoints" / "step-00000004"
    assert "is a checkpoint, which has no ledger; name the folder of its run" in refusal(capsys, "audit", str(saved))
    weights = str(saved / "model.safetensors")
    assert f"error: {weights} is a file; name a run folder" in refusal(capsys, "generate", weights, "x")


def test_variables_of_a_launcher_silence_no_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert "there is no folder" in refusal(capsys, "verify", str(tmp_path / "nothing"))
    with pytest.raises(SystemExit):
        main(["plan", "--training.max-stepz", "5"])
    assert "max-stepz" in capsys.readouterr().err


def test_verify_resume_proves_it_for_a_recipe(tiny: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "recipes" / "train_demo.py")
    arguments = flags(change(tiny, model={"dropout": 0.1}), DEMO)
    printed = call(capsys, "verify-resume", recipe, "--steps", "4", "--cut", "2", "--num-processes", "2", *arguments)
    assert "resumed run = uninterrupted run, bitwise" in printed
    assert "cut=9 must lie between" in refusal(
        capsys, "verify-resume", recipe, "--steps", "4", "--cut", "9", *arguments
    )


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Lets `verify_resume` make its starts here, where a test can take something away from them."""
    whole = tmp_path / "whole"  # the first start is the same every time

    def start(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        AcceleratorState._reset_state(True)
        recipe = Path(command[-1])
        if recipe.stem == "whole" and whole.exists():
            shutil.copytree(whole, recipe.with_suffix(""))
            return subprocess.CompletedProcess(command, 0, "", "")
        try:
            resume_worker.main(recipe)
            if recipe.stem == "whole":
                shutil.copytree(recipe.with_suffix(""), whole)
        except Exception as error:
            return subprocess.CompletedProcess(command, 1, "", f"{type(error).__name__}: {error}")
        return subprocess.CompletedProcess(command, 0, "", "")

    deterministic = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(subprocess, "run", start)
    yield
    torch.use_deterministic_algorithms(deterministic)
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("in_this_process")
def test_verify_resume_fails_for_each_part_that_is_not_saved_and_names_it(
    run: Path, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = change(tiny, training={"tokens_per_step": 64})
    assert "bitwise" in list(verify_resume(small, steps=2, cut=1))[-1]
    state = Trainer._state
    parts = set(checkpoint.load(run / "checkpoints" / "step-00000004").state) - {"step", "tokens"}  # the manifest's too
    assert parts == set(STATE_PARTS) - {"step"}
    for part in sorted(parts):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_state", lambda self, p=part: {k: v for k, v in state(self).items() if k != p})
            with pytest.raises(UserError, match=rf"a start failed: .*state\.json lacks {part}, "):
                list(verify_resume(small, steps=2, cut=1))


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("load_canonical", "model.safetensors: h.0.attn.c_attn.bias differs"),
        ("load_optimizer", "optimizer.safetensors: h.0.attn.c_attn.bias.exp_avg differs"),
        ("position", "state.json: position is 8 and 0"),
        ("loss_history", "state.json: loss_history is"),
        ("skipped_steps", "state.json: skipped_steps is 1 and 0"),
    ],
)
def test_verify_resume_fails_for_each_part_that_is_saved_but_not_restored(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch, lost: str, named: str
) -> None:
    load = Trainer._load

    def load_without(trainer: Trainer, path: Path | None) -> None:
        before = Trainer._state(trainer)
        load(trainer, path)
        if path is not None and lost == "loss_history":
            trainer.spikes.history.clear()
        elif path is not None and lost in before:
            setattr(trainer, lost, before[lost])

    if lost.startswith("load_"):
        monkeypatch.setattr(trainer_module, lost, lambda *_: None)
    else:
        monkeypatch.setattr(Trainer, "_load", load_without)
    if lost == "skipped_steps":
        step = Trainer.train_step

        def skip(trainer: Trainer) -> StepResult:
            result = step(trainer)
            trainer.skipped_steps += trainer.step == 1
            return result

        monkeypatch.setattr(Trainer, "train_step", skip)
    with pytest.raises(UserError, match=f"what was saved at step 1 did not come back: {named}"):
        list(verify_resume(tiny, steps=2, cut=1))


def test_each_part_of_the_state_that_is_lost_is_named(run: Path, tmp_path: Path) -> None:
    whole = checkpoint.load(run / "checkpoints" / "step-00000004")
    assert compare_states(whole, whole) is None
    for part in whole.state:
        lost = {name: value for name, value in whole.state.items() if name != part}
        other = checkpoint.Loaded(**{**vars(whole), "state": lost})
        assert compare_states(whole, other) == f"state.json: {part} is missing in the second"
    for file, tensors in (("model", whole.model), ("optimizer", whole.optimizer)):
        for name in tensors:
            changed = {**tensors, name: tensors[name] + 1e-3}
            difference = compare_states(whole, checkpoint.Loaded(**{**vars(whole), file: changed}))
            assert difference is not None
            assert difference.startswith(f"{file}.safetensors: {name} differs")
            without = {other: tensor for other, tensor in tensors.items() if other != name}
            lost = checkpoint.Loaded(**{**vars(whole), file: without})
            assert compare_states(lost, whole) == f"{file}.safetensors: {name} is missing in the first"
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert compare_runs(run, copy, step=4) is None
    (copy / ".rows.crc32").unlink()  # or the changed row would count as damaged
    text = (copy / "metrics.jsonl").read_text().splitlines()
    row = json.loads(text[1])
    row["loss/train"] = torch.nextafter(torch.tensor(row["loss/train"]), torch.tensor(0.0)).item()
    (copy / "metrics.jsonl").write_text("\n".join([text[0], json.dumps(row), *text[2:]]) + "\n")
    difference = compare_runs(run, copy, step=4)
    assert difference is not None
    assert difference.startswith("metrics.jsonl, step 2: loss/train is")


def test_verify_resume_wants_steps_and_processes(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "recipes" / "train_demo.py")
    for wrong in (["--steps", "1"], ["--steps", "6", "--num-processes", "0"]):
        assert "must be at least 2 and num_processes=" in refusal(capsys, "verify-resume", recipe, *wrong)


def test_a_terminal_that_knows_only_ascii_gets_escapes(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a text " * 50)
    out, ascii_only = tmp_path / "oé", environment(PYTHONIOENCODING="ascii")
    for verb in (["prepare", str(tmp_path / "x.txt"), "--out", str(out), "--tokenizer", "bytes"], ["--help"]):
        done = toolkit(*verb, env=ascii_only)
        assert done.returncode == 0, done.stderr
    done = toolkit("verify", str(out / "é"), env=ascii_only)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "o\\xe9/\\xe9" in done.stderr


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for verb in ("prepare", "verify", "generate", "evaluate", "export", "plan", "adopt", "audit", "verify-resume"):
        assert verb in printed
