"""The command itself: quick to start, light in imports, self-describing."""

import json
import resource
import subprocess
import sys

import pytest
import torch
from tiny_project import ROOT, distill, make_project, refusal, run_python

from distill import __version__

STAGE_VERBS = ["train", "cache", "prune", "quantize", "export", "evaluate", "bench"]
VERBS = ["run", *STAGE_VERBS, "compare", "explain", "serve", "inspect", "predict", "validate", "doctor"]


def test_help_is_instant_and_imports_no_torch():
    seconds = []
    for _ in range(3):  # processor time, which other work on the machine does not lengthen much; the best of three
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "distill", "--help"], cwd=ROOT, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) <= 0.5
    heavy = ["torch", "numpy", "pydantic", "omegaconf", "onnxruntime", "pyarrow"]
    shown = f"print([name for name in {heavy} if name in sys.modules])"
    code = f"import sys; from distill.cli import main\ntry: main(['--help'])\nfinally: {shown}"
    assert run_python(code).splitlines()[-1] == "[]"


def test_reading_a_recipe_imports_no_torch():
    code = (
        "import sys; from distill.recipe import load_recipe; load_recipe('quickstart'); print('torch' in sys.modules)"
    )
    assert run_python(code) == "False\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb):
    assert verb in distill("--help").out
    answer = distill(verb, "--help")
    assert answer.code == 0 and "Usage:" in answer.out


def test_version():
    assert distill("--version").out == f"multidistill {__version__}\n"


@pytest.mark.parametrize("arguments", [("nonsense",), ("run",), ("run", "quickstart", "--nonsense"), ("predict",)])
def test_wrong_calls_exit_2(arguments):
    answer = distill(*arguments)
    assert answer.code == 2 and "Usage:" in answer.err and "Traceback" not in answer.err


def test_validate(tmp_path, monkeypatch):
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert distill("validate", "recipe.yaml").out == "recipe.yaml: valid; run folder runs/tiny\n"
    assert distill("validate", "recipe", "name=other").out == "recipe: valid; run folder runs/other\n"
    assert distill("validate", "quickstart").code == 0
    assert distill("validate", "recipe.yaml", "--student", "image_only").code == 2  # its tasks are the emoji's
    assert "name a recipe" in refusal(distill("validate"))
    assert not (tmp_path / "runs").exists()


def test_validate_prints_the_schema_for_editors():
    schema = json.loads(distill("validate", "--schema").out)
    assert schema["title"] == "Recipe" and "prune" in schema["properties"]
    assert schema["$defs"]["TrainConfig"]["properties"]["optimizer"]["enum"][:2] == ["adamw", "sgd"]


def test_doctor():
    facts = json.loads(distill("doctor", "--json").out)
    assert facts["multidistill"] == __version__
    assert facts["packages"]["torch"] and facts["free_disk_bytes"] > 0 and facts["cpus"] >= 1
    assert "CPUExecutionProvider" in facts["onnxruntime_providers"]
    text = distill("doctor").out
    for word in ("torch", "processors:", "extra [quickstart]", "free disk here"):
        assert word in text


def test_doctor_tells_what_is_missing(monkeypatch):
    from distill import doctor

    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setattr(doctor, "EXTRAS", {"dev": "no_such_module"})
    text = distill("doctor").out
    assert "missing; pip install no-such-package" in text
    assert "extra [dev]: missing; pip install multidistill[dev]" in text


MORE_MEMORY = "use a smaller model, or a machine with more memory"


def test_our_own_run_time_errors_exit_1_and_a_full_disk_or_memory_too(monkeypatch):
    from distill import doctor
    from distill.step import TrainingError

    def failing(error):
        def fail():
            raise error

        monkeypatch.setattr(doctor, "describe", fail)
        return distill("doctor")

    answer = failing(TrainingError("the loss is\nnot finite"))
    assert (answer.code, answer.err) == (1, "error: the loss is not finite\n")
    answer = failing(OSError(28, "No space left on device", "cache/a"))
    assert (answer.code, answer.err) == (1, "error: [Errno 28] No space left on device: 'cache/a'\n")
    answer = failing(MemoryError())
    assert (answer.code, answer.err) == (1, f"error: out of memory (MemoryError); {MORE_MEMORY}\n")
    answer = failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nSee the documentation"))
    said = "CUDA out of memory. Tried to allocate 2.00 GiB"
    assert (answer.code, answer.err) == (1, f"error: out of memory ({said}); {MORE_MEMORY}\n")
    answer = failing(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"))
    assert answer.code == 1 and answer.err.endswith(f"{MORE_MEMORY}\n")
    for bug in (RuntimeError("of torch"), FileNotFoundError(2, "ours", "a")):
        with pytest.raises(type(bug)):
            failing(bug)


def test_a_process_group_is_left_at_the_end_unless_the_command_fails(tmp_path):
    script = f"""
import torch.distributed as dist
from distill import cli, ranks
for number, arguments in enumerate((["run", "no-such-recipe"], ["--version"])):
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method="file://{tmp_path / "group"}", rank=0, world_size=1)
    try:
        cli.main(arguments)
    except SystemExit as ended:
        print(ended.code, dist.is_initialized())
"""
    assert run_python(script).splitlines() == ["2 True", f"multidistill {__version__}", "0 False"]
