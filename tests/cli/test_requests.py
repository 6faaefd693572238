"""A wrong request ends with status 2 and one line that says what is wrong; nothing is written and nothing is overwritten."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from unisd_megatron.cli import main
from unisd_megatron.modes import MODES
from unisd_megatron.weights.tiny import byte_tokenizer, write_tiny

pytestmark = pytest.mark.usefixtures("no_queue_for_later_workers")

TRAIN: dict[str, str | None] = {
    "--mode": "vanilla",
    "--dataset": "addition",
    "--model_name": "model",
    "--output_dir": "run",
    "--num_train_examples": "16",
    "--max_completion_length": "4",
    "--max_steps": "1",
}
AGREEMENT = {"--mode": "agreement_tok_random", "--num-auxiliary-contexts": "2"}
SERVERS = {"--use_vllm": "", "--vllm_mode": "server", "--vllm_server_urls": "http://127.0.0.1:9"}
MBPP_ROW = {"task_id": 11, "text": "Add one.", "code": "def f(x):\n    return x + 1", "test_list": ["assert f(1) == 2"]}


def command(changes: Mapping[str, str | None]) -> list[str]:
    """`train` with TRAIN and changes to it: None takes a flag out, "" makes it one without a value."""
    flags = [(name, value) for name, value in {**TRAIN, **changes}.items() if value is not None and name != "WORLD_SIZE"]
    return ["train", *(word for flag in flags for word in flag if word)]


class Desk:
    """A folder to work in, with a model in it, that sees whatever a request writes."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capfd = capfd

    def content(self) -> dict[str, bytes | None]:
        return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(self.folder.rglob("*"))}

    def refused(self, arguments: Sequence[str], *words: str) -> None:
        before = self.content()
        self._capfd.readouterr()
        status = main(arguments)
        lines = [line for line in self._capfd.readouterr().err.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("unisd: "), lines
        assert [word for word in words if word not in lines[0]] == [], lines[0]
        assert status == 2
        assert self.content() == before

    def write(self, name: str, text: str) -> str:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)
        return name


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("requests") / "tiny"
    write_tiny("qwen2", folder, seed=0)
    return folder


@pytest.fixture
def desk(tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, tmp_path / "model")
    return Desk(tmp_path, capfd)


def test_the_request_without_a_fault_is_carried_out(desk: Desk) -> None:
    """Else what is refused below might be refused for another reason."""
    before = desk.content()
    assert main(command({})) == 0
    new = {Path(name).relative_to(desk.folder).parts[0] for name, content in desk.content().items() - before.items()}
    assert new == {"run"} and before.items() <= desk.content().items()


FLAGS: dict[str, tuple[dict[str, str | None], list[str]]] = {
    "unknown flag": ({"--learning_rates": "1"}, ["--learning_rates", "unisd", "--help"]),
    "flag cut short": ({"--learning": "1"}, ["--learning"]),
    "not a number": ({"--max_steps": "many"}, ["--max", "steps", "'many'"]),
    "unknown mode": ({"--mode": "unisd"}, ["--mode 'unisd'", *MODES]),
    "unknown data set": ({"--dataset": "sums"}, ["--dataset 'sums'", "addition", "gsm8k", "mbpp"]),
    "a data set for evaluation": (
        {"--dataset": "gpqa", "--model_name": "./absent"},
        ["--dataset gpqa is for evaluation only", "mbpp"],
    ),
    "no model": ({"--model_name": None}, ["--model_name is missing"]),
    "no data set": ({"--dataset": None}, ["--dataset is missing"]),
    "no output": ({"--output_dir": None}, ["--output_dir is missing"]),
    "no such model folder": ({"--model_name": "./absent"}, ["./absent", "no such folder"]),
    "no such data file": ({"--data_path": "absent.jsonl"}, ["absent.jsonl", "no such data file"]),
    "sequence parallel alone": ({"--sequence-parallel": ""}, ["--sequence-parallel", "--tensor-model-parallel-size 2"]),
    "odd global batch": ({"--micro-batch-size": "3"}, ["--global-batch-size 16", "--micro-batch-size 3"]),
    "two lengths": ({"--num_train_epochs": "2"}, ["--num_train_epochs does nothing", "--max_steps left out"]),
    "released and packed": ({"--semantics": "released", "--packing": ""}, ["--semantics released", "--packing"]),
    "released sequences in parts": ({"--semantics": "released", "--cp": "2"}, ["--semantics released", "--context-parallel"]),
    "no ranks": ({"--tp": "0"}, ["tensor_model_parallel_size is 0", "at least 1"]),
    "agreement without contexts": ({"--mode": "agreement_tok_random"}, ["--num-auxiliary-contexts", "--fewshot_method random"]),
    "no embeddings": (
        AGREEMENT | {"--mode": "agreement_seq_retrieval", "--retrieval_model": "./model"},
        [
            "cache/embeddings/addition-",
            "run `unisd prepare embeddings --dataset addition --num_train_examples 16 --retrieval_model",
        ],
    ),
    "no instructions": (
        AGREEMENT | {"--mode": "agreement_tok_induction", "--num_demos": "3"},
        [
            "cache/induction",
            "run `unisd prepare induction --dataset addition --num_train_examples 16 --model_name model --num_demos 3`",
        ],
    ),
    "no model of retrieval": (
        AGREEMENT | {"--mode": "agreement_seq_retrieval", "--retrieval_model": "./absent"},
        ["--retrieval_model ./absent", "no such folder"],
    ),
    "no wrong solutions": ({"--mode": "contrastive", "--negatives": "generated"}, ["addition has no kinds of wrong solutions"]),
    "idle instructions": (AGREEMENT | {"--num_demos": "3"}, ["--num_demos", "--fewshot_method induction"]),
    "idle retrieval": (AGREEMENT | {"--retrieval_model": "model"}, ["--retrieval_model", "--fewshot_method retrieval"]),
    "idle demonstrations": (
        AGREEMENT | {"--mode": "agreement_tok_induction", "--demo_k": "2"},
        ["--demo_k", "--fewshot_method random or retrieval"],
    ),
    "idle gold": ({"--auxiliary_gold": ""}, ["--auxiliary_gold", "--num-auxiliary-contexts"]),
    "idle negatives": ({"--negatives": "generated"}, ["--negatives does nothing", "--contrastive_weight"]),
    "idle cache": (AGREEMENT | {"--cache_dir": "elsewhere"}, ["--cache_dir", "--negatives generated"]),
    "negatives by a rule": (
        {"--mode": "contrastive", "--negatives_per_example": "2"},
        ["--negatives_per_example does nothing with --negatives corrupted", "addition"],
    ),
    "no wrong solution each": (
        {"--mode": "contrastive", "--negatives": "generated", "--negatives_per_example": "0"},
        ["--negatives_per_example is 0", "at least 1"],
    ),
    "contexts against the mode": (AGREEMENT | {"--fewshot_method": "retrieval"}, ["random contexts", "method retrieval"]),
    "idle margin": ({"--contrastive_margin": "0.5"}, ["--contrastive_margin", "vanilla", "--contrastive_weight"]),
    "idle gamma": ({"--mode": "ema", "--gamma_agreement": "1"}, ["--gamma_agreement", "ema", "agreement modes"]),
    "idle ema": ({"--ref_model_mixup_beta": "0.9"}, ["--ref_model_mixup_beta", "vanilla", "--teacher ema"]),
    "idle teacher memory": ({"--teacher": "live", "--teacher-memory": "swap"}, ["--teacher_memory", "frozen or ema"]),
    "idle matching": ({"--final-layer-distill-weight": "1"}, ["--final_layer_distill_weight", "match_joint"]),
    "idle contexts": ({"--num-auxiliary-contexts": "2"}, ["--num_auxiliary_contexts", "agreement modes"]),
    "idle replay": ({"--replay_path": "model"}, ["--replay_path", "--rollout replay"]),
    "idle evaluation": ({"--eval_examples": "5"}, ["--eval_examples", "--eval_steps"]),
    "two ceilings": ({"--token_clip": "5", "--token_clip_quantile": "0.9"}, ["--token_clip ", "_quantile", "give one"]),
    "alpha": ({"--alpha": "1.5"}, ["--alpha is 1.5", "between 0 and 1"]),
    "alpha is no number": ({"--alpha": "nan"}, ["--alpha is nan", "finite"]),
    "quantile": ({"--token_clip_quantile": "1"}, ["--token_clip_quantile is 1.0"]),
    "temperature": ({"--temperature": "0"}, ["--temperature must be positive"]),
    "prompts too long": ({"--max_prompt_length": "5"}, ["all 16 examples", "--max_prompt_length 5", "46 tokens"]),
    "no recording": ({"--rollout": "replay", "--replay_path": "absent"}, ["absent", "no completions recorded for step 0"]),
    "idle vllm": ({"--vllm_mode": "server"}, ["--vllm_mode does nothing", "it acts with --use_vllm"]),
    "no servers": ({**SERVERS, "--vllm_server_urls": None}, ["--vllm_server_urls http://host:port", "tools/serve_vllm.py"]),
    "no url": ({**SERVERS, "--vllm_server_urls": "a:80"}, ["a:80 is no URL"]),
    "a server twice": ({**SERVERS, "--vllm_server_urls": "http://a:80,http://a:80/"}, ["names a server twice"]),
    "ranks less patient than rank 0": (
        {**SERVERS, "--distributed-timeout-minutes": "9.5"},
        ["--distributed-timeout-minutes 9.5 is too short", "use 10 or more"],
    ),
    "no patience": ({"--distributed-timeout-minutes": "0"}, ["--distributed-timeout-minutes must be positive"]),
    "idle in server mode": ({**SERVERS, "--vllm_tensor_parallel_size": "2"}, ["it acts with --vllm_mode colocate"]),
    "idle when colocated": ({"--use_vllm": "", "--max_rollout_lag": "1"}, ["--max_rollout_lag", "--vllm_mode server"]),
    "idle lag": ({"--max_rollout_lag": "1"}, ["--max_rollout_lag", "it acts with --use_vllm --vllm_mode server"]),
    "engine of two of one": ({"--use_vllm": "", "--vllm_tensor_parallel_size": "2"}, ["does not divide 1 processes; use 1"]),
    "too cold for vllm": ({"--use_vllm": "", "--temperature": "0.001"}, ["vLLM samples at 0.01 at least"]),
    "replayed vllm": ({"--use_vllm": "", "--rollout": "replay", "--replay_path": "model"}, ["--use_vllm", "drop one"]),
    "replayed importance": (
        {"--rollout": "replay", "--replay_path": "model", "--importance_sampling_cap": "2"},
        ["--importance_sampling_cap needs log-probs of the weights that sampled"],
    ),
    "negative min_p": ({"--min_p": "-0.1"}, ["--min_p lies in [0, 1)"]),
    "no penalty": ({"--repetition_penalty": "0"}, ["--repetition_penalty must be positive"]),
    "no replay path": ({"--rollout": "replay"}, ["--rollout replay needs --replay_path"]),
    "no checkpoint": ({"--resume_from_checkpoint": "absent"}, ["absent", "not a complete checkpoint"]),
    "no latest": ({"--resume_from_checkpoint": "latest"}, ["run: no complete checkpoint to resume from"]),
    "evaluation of a missing file": ({"--eval_steps": "1", "--eval_data_path": "absent.jsonl"}, ["absent.jsonl", "no such"]),
    "heads": ({"WORLD_SIZE": "16", "--tp": "16"}, ["tensor-parallel 16", "8 attention heads", "use 1, 2, 4, 8"]),
    "key/value heads": ({"WORLD_SIZE": "8", "--tp": "8"}, ["tensor-parallel 8", "4 key/value heads", "use 1, 2, 4"]),
    "layers": (
        {"WORLD_SIZE": "3", "--pp": "3", "--global-batch-size": "3"},
        ["pipeline-parallel 3", "4 layers", "use 1, 2, 4"],
    ),
    "world": (
        {"WORLD_SIZE": "6", "--tp": "2", "--pp": "2"},
        ["6 processes", "tensor-parallel 2 x pipeline-parallel 2", "multiple of 4"],
    ),
    "no experts": ({"WORLD_SIZE": "2", "--ep": "2"}, ["expert-parallel 2", "has no experts"]),
    "experts over too few": ({"WORLD_SIZE": "2", "--tp": "2", "--ep": "2"}, ["--expert-model-parallel-size 2", "the 1 ranks"]),
    "experts without sequence parallel": (
        {"WORLD_SIZE": "4", "--tp": "2", "--ep": "2"},
        ["--expert-model-parallel-size with tensor parallelism needs --sequence-parallel"],
    ),
    "global batch": ({"WORLD_SIZE": "3"}, ["--global-batch-size 16", "--micro-batch-size 1 x 3 data-parallel ranks"]),
    "no configuration": ({"--config": "absent.yaml"}, ["--config absent.yaml", "no such file"]),
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_wrong_flag_or_layout_of_train_is_refused(desk: Desk, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    changes, words = FLAGS[name]
    monkeypatch.setenv("WORLD_SIZE", changes.get("WORLD_SIZE") or "1")
    desk.refused(command(changes), *words)


def test_other_processes_leave_the_word_to_the_first(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """They wait for it to end the run; what only they have seen they say themselves, with their rank."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setenv("RANK", "1")
    assert main(command({"--mode": "unisd"})) == 2
    assert waits and capfd.readouterr().err.startswith("unisd (rank 1): unknown --mode")


def another_family(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"model_type": "qwen2"', '"model_type": "gpt2"'))


def edited(edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def index_without_file(folder: Path) -> None:
    files = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    files["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def larger_tokenizer(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<extra {i}>" for i in range(43)])
    tokenizer.save_pretrained(folder)


GATE, WORDS = "model.layers.2.mlp.gate_proj.weight", "model.embed_tokens.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config.json": (lambda folder: (folder / "config.json").unlink(), ["model: no config.json"]),
    "config.json is not JSON": (lambda folder: (folder / "config.json").write_text('{"a": '), ["config.json: not JSON"]),
    "unsupported family": (another_family, ["model_type 'gpt2'", "qwen2, llama"]),
    "no safetensors": (lambda folder: (folder / "model.safetensors").unlink(), ["model: no model.safetensors"]),
    "cut safetensors": (
        lambda folder: os.truncate(folder / "model.safetensors", 300_000),
        ["model.safetensors: not a complete"],
    ),
    "index without file": (index_without_file, ["model-00002-of-00002.safetensors", "missing"]),
    "tensor missing": (edited(lambda t: t.pop(GATE)), [GATE, "is missing"]),
    "tensor misshapen": (edited(lambda t: t.update({GATE: t[GATE][1:]})), [GATE, "config.json"]),
    "small vocabulary": (edited(lambda t: t.update({WORDS: t[WORDS][:290]})), [WORDS, "290", "300"]),
    "tokenizer too large": (larger_tokenizer, ["tokenizer has 301 entries", "only 300"]),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ["model: no tokenizer"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_model_folder_is_refused_by_train_and_import(desk: Desk, name: str) -> None:
    damage, words = DAMAGE[name]
    damage(desk.folder / "model")
    desk.refused(command({}), *words)
    if "tokenizer" not in name:
        desk.refused(["convert", "import", "--model_name", "model", "--output_dir", "megatron"], *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["rows.jsonl", "the data set is empty"]),
        ('{"a": 1, "b": 3}\n{"a": 2, "b": \n', ["rows.jsonl, line 2: not JSON"]),
        ('{"a": 1, "b": 3}\n{"question": "1+1?"}\n', ["rows.jsonl, line 2", "addition", "'a' is missing"]),
    ],
)
def test_a_wrong_data_file_is_refused(desk: Desk, text: str, words: list[str]) -> None:
    desk.refused(command({"--data_path": desk.write("rows.jsonl", text)}), *words)


def test_held_out_questions_that_no_engine_has_room_for_are_refused(desk: Desk) -> None:
    """Else the engine stops the run, or a server cuts them short, at the first evaluation."""
    rows = [json.dumps({"question": text, "answer": "It is 2. #### 2"}) for text in ("1+1?", "1+1? " * 200)]
    desk.write("short.jsonl", "\n".join(rows[:1] * 16))
    desk.write("long.jsonl", "\n".join(rows))
    asked = {"--dataset": "gsm8k", "--data_path": "short.jsonl", "--eval_steps": "1", "--eval_data_path": "long.jsonl"}
    words = ["1 of 2 held-out questions", "--max_prompt_length 500", "the longest has 11"]
    desk.refused(command(asked | {"--max_prompt_length": "500"}), *words)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("run.yaml", "learning_rat: 1.0e-4\n", ["run.yaml", "unknown setting 'learning_rat'"]),
        ("run.yaml", "alpha: [0.5\n", ["--config run.yaml", "line"]),
        ("run.yaml", "alpha: low\n", ["run.yaml", "alpha is 'low'", "expected float"]),
        ("run.yaml", "- alpha\n", ["run.yaml", "expected settings"]),
        ("run.json", '{"alpha": 0.5', ["--config run.json", "line 1"]),
        ("run.yaml", "alpha: 0.5\nbf16: true\nalpha: 1\n", ["--config run.yaml: line 3", "'alpha' stands in line 1 already"]),
        ("run.json", '{"alpha": 0.5, "alpha": 1}', ["--config run.json", "'alpha' stands there twice"]),
        ("run.yaml", "max_steps: 2\nmax-steps: 3\n", ["--config run.yaml", "max_steps stands there twice"]),
    ],
)
def test_a_wrong_configuration_file_is_refused(desk: Desk, file: str, text: str, words: list[str]) -> None:
    desk.refused(command({"--config": desk.write(file, text)}), *words)


def test_a_folder_that_holds_another_run_is_refused(desk: Desk) -> None:
    desk.write("run/run.json", "{}")
    desk.refused(command({}), "run: not empty", "--resume_from_checkpoint auto")


def test_a_half_written_checkpoint_is_refused(desk: Desk) -> None:
    checkpoint = "run/checkpoints/step_000001.partial"
    desk.write(f"{checkpoint}/state.json", "{}")
    desk.write(f"{checkpoint}/shards/metadata.json", "{}")
    desk.refused(command({"--resume_from_checkpoint": checkpoint}), "step_000001.partial", "half-written")
    desk.refused(command({"--resume_from_checkpoint": "latest"}), "run: no complete checkpoint")


GOLD = "evaluate --dataset mbpp --data_path rows.jsonl --output_dir new --references"
SCORE = GOLD.replace("--references", "--model_name model")
PREPARE = "prepare {} --dataset addition --num_train_examples 4 --cache_dir new"
OTHERS: dict[str, tuple[str, list[str]]] = {
    "no subcommand": ("", ["COMMAND"]),
    "unknown subcommand": ("trian", ["'trian'", "train", "convert"]),
    "unknown family": ("tiny --family gpt2 --output_dir new", ["'gpt2'", "qwen2", "llama"]),
    "prepare nothing": ("prepare", ["negatives|induction|embeddings"]),
    "prepare without a model": (PREPARE.format("negatives"), ["--model"]),
    "prepare without kinds": (
        f"{PREPARE.format('negatives')} --model_name model",
        ["addition has no kinds of wrong solutions"],
    ),
    "prepare for an unknown set": ("prepare embeddings --dataset sums", ["--dataset 'sums'", "addition"]),
    "prepare for evaluation": ("prepare embeddings --dataset gpqa", ["gpqa", "for evaluation only"]),
    "prepare of no example": ("prepare embeddings --dataset addition --num_train_examples 0", ["--num_train_examples is 0"]),
    "prepare in no batch": (f"{PREPARE.format('induction')} --model_name model --batch_size 0", ["--batch_size is 0"]),
    "prepare too cold": (
        f"{PREPARE.format('induction')} --model_name model --cache_temperature 0",
        ["--cache_temperature is 0"],
    ),
    "too few for a group": (
        "prepare induction --dataset mbpp --data_path train.jsonl --cache_dir new --model_name model",
        ["--num_demos 5", "1 record"],
    ),
    "no room for instructions": (f"{PREPARE.format('induction')} --model_name model", ["addition", "no instruction"]),
    "prepare with no embedder": (f"{PREPARE.format('embeddings')} --retrieval_model ./absent", ["--retrieval_model ./absent"]),
    "tiny into a folder": ("tiny --family qwen2 --output_dir model", ["model: exists already"]),
    "export of a Hugging Face folder": ("convert export --model_name model --output_dir new", ["Hugging Face folder already"]),
    "import to a folder": ("convert import --model_name model --output_dir model", ["model: exists already"]),
    "import without target": ("convert import --model_name model", ["--output"]),
    "import at a wrong layout": ("convert import --model_name model --output_dir new --pp 3", ["4 layers of model", "1, 2, 4"]),
    "import at no layout": ("convert import --model_name model --output_dir new --tp 0", ["at least 1"]),
    "verify against nothing": ("verify --model_name model --against ./absent", ["absent: no such folder"]),
    "golden of a missing file": ("parity golden absent.json", ["absent.json", "not a golden-vector file"]),
    "golden of another file": ("parity golden model/config.json", ["model/config.json", "not a golden-vector file"]),
    "parity overlapping nothing": ("parity --overlap-grad-reduce", ["with one data-parallel rank nothing is reduced"]),
    "parity at a wrong layout": ("parity --tp 2", ["1 processes", "tensor-parallel 2"]),
    "evaluate of nothing": ("evaluate --dataset addition", ["--references or --model_name"]),
    "evaluate of both": ("evaluate --dataset addition --references --model_name model", ["--references or --model_name"]),
    "evaluate on an unknown set": ("evaluate --dataset sums --references", ["--dataset 'sums'", "addition"]),
    "evaluate of no example": ("evaluate --dataset addition --references --max_examples 0", ["--max_examples"]),
    "evaluate into a folder": ("evaluate --dataset addition --references --output_dir model", ["model: exists already"]),
    "evaluate of a missing model": ("evaluate --dataset addition --model_name ./absent --output_dir new", ["./absent"]),
    "an idle flag of references": (f"{GOLD} --fit", ["--fit does nothing with --references"]),
    "no workers": (f"{GOLD} --workers 0", ["--workers is 0", "at least 1"]),
    "a split that is not there": (f"{GOLD} --split train", ["rows.jsonl", "no train record", "mbpp"]),
    "greedy samples": (f"{SCORE} --samples 4", ["--samples 4", "all the same", "--temperature"]),
    "greedy top_p": (f"{SCORE} --top_p 0.9", ["--top_p does nothing", "--temperature"]),
    "a negative temperature": (f"{SCORE} --temperature -1", ["--temperature is -1.0"]),
    "options of a task without": (f"{SCORE} --method logprobs", ["--method logprobs", "mbpp has none"]),
    "options sampled": (f"{SCORE} --method logprobs --temperature 1", ["generates nothing; drop --temperature"]),
    "retention without base": (f"{SCORE} --retention", ["--retention", "--base_model_name"]),
    "idle base": (f"{SCORE} --base_model_name model", ["--base_model_name does nothing without --retention"]),
    "idle vllm of evaluate": (f"{SCORE} --vllm_kv_cache_gib 2", ["--vllm_kv_cache_gib does nothing", "--engine vllm"]),
    "no room for prompts": (f"{SCORE} --max_prompt_length 4096", ["--max_prompt_length 4096", "4096 positions of model"]),
    "compare with nothing": (f"{SCORE} --compare model", ["model: no finished evaluation"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_subcommands_refuse(desk: Desk, name: str) -> None:
    arguments, words = OTHERS[name]
    desk.write("rows.jsonl", json.dumps(MBPP_ROW))
    desk.write("train.jsonl", json.dumps(MBPP_ROW | {"task_id": 601}))
    desk.refused(arguments.split(), *words)
