"""The schema of a recipe, and the words in which its mistakes are told.

How a recipe is read is in :mod:`distill.recipe`, how its parts are built in :mod:`distill.builders`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from distill.data_config import DataConfig, Part, Strict
from distill.report_config import BenchConfig, FitConfig, ReportConfig, RetrievalConfig
from distill.schedules import Weight

EXPECTED = {
    "model_type": "Input should be a mapping of keys",
    "dict_type": "Input should be a mapping of keys",
    "is_instance_of": "Input should be a list",
    "list_type": "Input should be a list",
}
"""Kind of pydantic's complaint -> what it says in a message."""
SHOWN = 80
"""Characters of a wrong value that a message repeats."""
OptimizerName = Literal[
    "adamw", "sgd", "adam", "nadam", "radam", "adamax", "adagrad", "adadelta", "adafactor", "rmsprop", "asgd", "muon"
]
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


FP32, INT8 = "onnx-fp32", "onnx-int8"
"""The bundles of every run, unless ``export.bundles`` says otherwise."""
EMA = "ema"
"""The teacher that is the average of the student's own weights."""


def of_teacher(name: str, teacher: str | None) -> str:
    """Return the name of an output among those of all teachers: ``NAME@TEACHER``, or just ``NAME`` of the run's own."""
    return name if teacher is None else f"{name}@{teacher}"


class MixConfig(Strict):
    """How a term's teachers are mixed, row by row; weights add up to 1 over the teachers that can read a row."""

    by: Literal["weights", "learned", "confidence"] = "weights"
    weights: list[Annotated[float, Field(gt=0)]] | None = None  # one a teacher, in proportion; "learned" begins there
    average: Literal["losses", "probabilities"] = "losses"  # of the loss's values, or of what the teachers predict


class TermConfig(Strict):
    """One term of an objective: a loss on one task, one embedding or one pair of taps."""

    loss: str
    weight: Weight = 1.0
    task: str | None = None  # "category", or "category.image" for one head; in a file "*" or "*.image" too: each task's
    embedding: str | None = None  # "image", "text" or "fused"; "image,text" for a contrastive loss
    taps: dict[Literal["student", "teacher"], str | list[str]] | None = None  # a list for losses on several stages
    # of the recipe's ``teachers``, or "ema"; absent or "teacher": the run's own
    teacher: str | list[str] | None = None
    mix: MixConfig | None = None  # of a list of teachers; a word means its ``by``
    positives: list[Literal["text", "image", "group"]] = []  # rows with an equal one are no negatives of each other
    params: dict[str, Any] = {}  # of the loss; numbers may be a Schedule

    @field_validator("mix", mode="before", json_schema_input_type=str | MixConfig | None)
    @classmethod
    def _by_a_word(cls, value: Any) -> Any:
        return {"by": value} if isinstance(value, str) else value

    @property
    def name(self) -> str:
        """The name under which the term is logged."""
        target = self.task or self.embedding or ",".join(self.tapped("student"))
        teacher = "+".join(self.teacher) if isinstance(self.teacher, list) else self.teachers[0]
        return of_teacher(f"{self.loss}/{target}", teacher)

    @property
    def teachers(self) -> tuple[str | None, ...]:
        """The teachers that it names; None is the run's own."""
        names = self.teacher if isinstance(self.teacher, list) else [self.teacher]
        return tuple(None if name == "teacher" else name for name in names)

    def tapped(self, side: Literal["student", "teacher"]) -> list[str]:
        """The taps of one side."""
        paths = (self.taps or {}).get(side, [])
        return [paths] if isinstance(paths, str) else paths


class ProgressiveResizing(Strict):
    """Small images first: most of what they show is learnt at a fraction of the cost.

    It saves nothing with encoders that bring images to a size of their own, as pretrained ones do.
    """

    size: int = Field(ge=8)  # pixels, less than the data's working size
    until: float = Field(0.6, gt=0, lt=1)  # share of all steps; the rest sees whole images


class BalanceConfig(Strict):
    """How modalities are kept from outrunning each other in joint training, or just watched: see distill/balance.py."""

    # 0 measures only. The paper has 0.1 to 0.8; this is their geometric middle, where who leads keeps at most 71 %
    alpha: float = Field(0.3, ge=0)
    noise: bool = True  # normal, as strong as each gradient's own deviation
    until: float = Field(1.0, gt=0, le=1)  # share of all steps; behind it modalities are only measured


class ClassBalance(Strict):
    """An epoch draws as many rows as there are, with replacement, rare classes' more often."""

    task: str  # whose classes; of several labels a row's rarest counts
    power: float = Field(1.0, ge=0, le=2)  # a row's weight is (rows of its class) ** -power; 1: all classes alike


class MixImages(Strict):
    """Images of two rows of a batch made one; batches are mixed in one way each."""

    mixup: float = Field(0.0, ge=0)  # alpha of Beta(alpha, alpha), from which the share comes; 0: never
    cutmix: float = Field(0.0, ge=0)  # the same of CutMix; where both are given, each has half of the batches
    probability: float = Field(1.0, gt=0, le=1)  # of a batch

    @model_validator(mode="after")
    def _mix_somehow(self) -> MixImages:
        if not self.mixup and not self.cutmix:
            raise ValueError("mixup and cutmix are both 0, so nothing is mixed; raise one, as mixup to 0.2")
        return self


class TrainConfig(Strict):
    """One training budget, the same schema for teacher, baseline, student and recovery."""

    epochs: int = Field(10, ge=1)
    batch_size: int = Field(128, ge=1)  # global, over all ranks
    group_by_length: bool = False  # a batch has texts of like length, which leaves little padding to compute
    optimizer: OptimizerName = "adamw"
    optimizer_params: dict[str, Any] = {}  # what else torch.optim's class of that name takes
    lr: float = Field(1e-3, gt=0)
    lr_scale: dict[str, Annotated[float, Field(ge=0)]] = {}  # module-path prefix -> factor on lr; 0 freezes it
    weight_decay: float = Field(0.01, ge=0)
    decay_vectors: bool = False  # of biases and norms too
    momentum: float = Field(0.9, ge=0, lt=1)  # sgd only
    schedule: Literal["cosine", "constant", "onecycle", "step"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1)  # fraction of all steps
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = [0.5, 0.75]  # "step" only: fractions of all steps
    gamma: float = Field(0.1, gt=0, le=1)  # "step" only: factor on lr at each milestone
    clip_norm: float | None = Field(1.0, gt=0)
    accumulate: int = Field(1, ge=1)  # micro-batches a step; the effective batch stays batch_size
    ema: float | None = Field(None, gt=0, lt=1)  # decay of the averaged weights that are evaluated and kept
    precision: Literal["no", "bf16", "fp16"] = "no"
    shard: bool = False  # weights, gradients and optimizer state are split over the ranks (FSDP2)
    progressive_resizing: ProgressiveResizing | None = None
    balance: BalanceConfig | None = None  # of modalities; needs heads of single ones that learn
    class_balance: ClassBalance | None = None  # draw rows of rare classes more often
    mix_images: MixImages | None = None  # mixup and CutMix, of a student that reads images alone
    compile: bool = False  # torch.compile of the trained model
    channels_last: bool = False  # memory format of its convolutions and images; "convnet" always has it
    keep: Literal["best", "last"] = "best"  # weights of the best validated epoch, or of the last one
    patience: int | None = Field(None, ge=1)  # epochs without a better validation metric before stopping
    validate_every: int = Field(1, ge=1)  # epochs
    checkpoint_minutes: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    max_minutes: float | None = Field(None, gt=0)  # of steps and their waiting; the last epoch is validated and kept
    not_finite: Literal["raise", "skip", "rollback"] = "raise"  # skip a bad step, or go back to the last checkpoint too


class ModelConfig(Strict):
    """Encoders, one a modality, their fusion, and one head a task; without fusion, encoders of one embedding space."""

    encoders: dict[str, Part] = Field(min_length=1)
    exchange: Part | None = None  # what encoders that have stages tell each other between these
    fusion: Part | None = Part(type="concat")
    heads: dict[str, Part] = {}  # task -> head; every task of the data gets a linear one if empty
    embedding_dim: int = Field(128, ge=1)  # width of the shared image / text / fused embedding space
    unimodal_heads: bool = True  # a task is decided by the fused head and one head a modality
    decision: Literal["mean", "learned", "product", "mixture"] = "mean"  # how: see distill/decision.py
    head_weights: dict[str, Annotated[float, Field(ge=0)]] = {}  # "fused" or modality -> its weight there; else 1
    modality_dropout: float = Field(0.0, ge=0, lt=1)  # probability that a training row loses one modality
    dropout: float = Field(0.0, ge=0, lt=1)  # of pooled and token features after their projection to the fusion's width


class ClassNamesConfig(Strict):
    """Names of classes as texts of their own: what a class is called says what belongs to it."""

    tasks: list[str] = []  # whose names are read, each as a training text with this one label and no other modality
    ratio: float = Field(0.15, gt=0)  # of them to the data's rows, in each batch


class TeacherConfig(ModelConfig):
    """The teacher, and how it is fitted to the data before distillation."""

    members: int = Field(1, ge=1)  # of an ensemble that shares the encoders; each learns alone, logits are averaged
    class_names: ClassNamesConfig = ClassNamesConfig()
    pretrain: dict[str, TrainConfig] = {}  # modality -> budget in which its encoder learns alone, a frozen one too
    train: TrainConfig = TrainConfig()
    objective: list[TermConfig]  # empty where it has nothing to learn


class OtherTeacherConfig(Strict):
    """A model of another run that teaches here."""

    run: str  # that run's folder, OUTPUT/NAME
    stage: Literal["teacher", "baseline", "student", "pruned"] = "teacher"  # which of its models


class StudentConfig(ModelConfig):
    """The student, what it inherits from the teacher, and its budget."""

    inherit: dict[str, Part] = {}  # modality -> how that encoder starts from the teacher's
    train: TrainConfig = TrainConfig()
    baseline: list[TermConfig] = Field(min_length=1)  # the objective without a teacher
    objective: list[TermConfig] = Field(min_length=1)  # the objective with one


class TransferConfig(Strict):
    """Texts without labels, made from the training texts, on which the student learns what the teacher says."""

    texts: int = Field(0, ge=0)  # how many to make
    replace: float = Field(0.5, gt=0, le=1)  # probability that a word gives way to one of the teacher's vocabulary
    ratio: float = Field(1.0, gt=0)  # of them to labelled rows, in each batch; the last of a pass may have fewer


class CaptionsConfig(Strict):
    """Captions that the teacher writes for training rows, which the student learns in place of the true ones."""

    beams: int = Field(4, ge=1)  # of the teacher's beam search
    share: float = Field(1.0, gt=0, le=1)  # of rows whose caption is the teacher's


class CacheConfig(Strict):
    """Teacher outputs kept on disk."""

    enabled: bool = True  # false: the teacher runs live in every step
    views: int = Field(4, ge=1)  # augmentation views a row
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    captions: CaptionsConfig | None = None  # kept whether outputs are or not
    taps: list[str] = []  # of the run's own teacher, stored beside those that terms read: for other terms to come


class VocabularyConfig(Strict):
    """Word embeddings that go because training rows have no use for them; see distill/prune/vocabulary.py."""

    min_count: int = Field(1, ge=1)  # tokens that come fewer times in training rows lose their row
    dropped: Literal["nearest", "unknown"] = "nearest"  # they are read as the kept token most like them, or as unknown


class PruneConfig(Strict):
    """Structured pruning and recovery."""

    ratio: float = Field(0.5, ge=0, lt=1)  # share of channels removed; 0: heads, their dimensions or blocks alone go
    importance: Literal["magnitude", "taylor", "hessian", "bn_scale", "random"] = "magnitude"
    rows: int = Field(256, ge=2)  # training rows that importance, depth and sensitivity read, in batches of 32
    scope: Literal["global", "layer"] = "global"  # what is ranked together: all, or the channels or heads of each layer
    ratios: dict[str, Annotated[float, Field(ge=0, lt=1)]] = {}  # module-path prefix, the longest counts -> its own
    sensitivity: bool = False  # a scan of what each stage costs gives them ratios, which reach ``ratio`` together
    round_to: int = Field(8, ge=1)
    modules: list[str] | None = None  # module-path prefixes that may be pruned; absent: all encoders but that of text
    heads: float = Field(0.0, ge=0, lt=1)  # share of attention heads removed
    head_dims: float = Field(0.0, ge=0, lt=1)  # share of each head's dimensions removed
    depth: dict[str, Annotated[int, Field(ge=1)]] = {}  # path of a list of residual blocks -> how many go
    vocabulary: VocabularyConfig | None = None  # rows of the text encoder's table that go, in the last step
    steps: int = Field(1, ge=1)  # of pruning, each followed by its share of ``train``
    train: TrainConfig = TrainConfig()

    @property
    def structured(self) -> bool:
        """Whether blocks, heads, dimensions or channels go."""
        return any((self.ratio, self.heads, self.head_dims, self.depth, *self.ratios.values()))

    @model_validator(mode="after")
    def _prune_something(self) -> PruneConfig:
        if self.sensitivity and (self.ratios or not self.ratio):
            raise ValueError("sensitivity finds the ratios that reach ratio; leave ratios out and set ratio above 0")
        if self.sensitivity and self.steps > 1:
            raise ValueError("sensitivity measures the whole student once; set steps to 1")
        if not (self.structured or self.vocabulary):
            raise ValueError("ratio is 0 and so is all else, so nothing is pruned; raise one")
        for name in ("epochs", "max_steps"):
            budget = getattr(self.train, name)
            if budget is not None and budget < self.steps:
                raise ValueError(f"train.{name} is {budget}, fewer than steps, {self.steps}; each step needs one")
        return self


class AwareTrainConfig(TrainConfig):
    """A budget for weights that are nearly right."""

    epochs: int = Field(3, ge=1)
    lr: float = Field(1e-4, gt=0)


class AwareConfig(Strict):
    """Training with the rounding of int8 (quantization-aware), for bundles named RUNTIME-int8-qat."""

    train: AwareTrainConfig = AwareTrainConfig()
    objective: list[TermConfig] | None = Field(None, min_length=1)  # the student's if absent


class QuantizeConfig(Strict):
    """How the exported graph is quantized; what is calibrated belongs to static int8, trained or not."""

    calibration_rows: int = Field(256, ge=8)
    method: Literal["minmax", "entropy", "percentile"] = "minmax"
    per_channel: bool = True
    keep_float: list[str] = []  # parts of node names that stay in float
    search: bool = False  # static int8: keep further layers in float, as few as its gate allows
    qat: AwareConfig = AwareConfig()


class ExportConfig(Strict):
    """The exported bundles and their gates."""

    opset: int = Field(20, ge=18)
    bundles: list[str] = [FP32, INT8]  # RUNTIME-PRECISION; that of fp32, which the others are made from, is always made
    embeddings: bool = True  # bundles give them beside the tasks' outputs; false: smaller and faster without
    # top-1, or mean cosine of embeddings; validation rows: of onnx-fp32 and fp16, and of all smaller ones
    min_agreement_fp32: float = Field(0.995, ge=0, le=1)
    min_agreement_int8: float = Field(0.98, ge=0, le=1)
    min_agreement: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}  # bundle -> its own, instead
    # validation rows that a bundle brings which this system cannot run, with its source's answers; 0: none leave it
    check_rows: int = Field(8, ge=0, le=256)
    quantize: QuantizeConfig = QuantizeConfig()

    @field_validator("bundles")
    @classmethod
    def _fp32_first(cls, names: list[str]) -> list[str]:
        return list(dict.fromkeys([FP32, *names]))


class Recipe(Strict):
    """One job from data to report."""

    version: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", coerce_numbers_to_str=True)
    seed: int = Field(0, ge=0, lt=2**31)
    output: str = "runs"
    trackers: list[TrackerName] = ["tensorboard"]  # who is told of trainings beside metrics.jsonl; changes no result
    # threads that make batches ahead; by default none where the processor trains and images are decoded, else one
    workers: int | None = Field(None, ge=0, le=64)
    data: DataConfig
    teacher: TeacherConfig
    teachers: dict[str, OtherTeacherConfig] = {}  # name -> a further teacher, which terms of student.objective name
    student: StudentConfig
    transfer: TransferConfig = TransferConfig()
    cache: CacheConfig = CacheConfig()
    prune: PruneConfig = PruneConfig()
    export: ExportConfig = ExportConfig()
    bench: BenchConfig = BenchConfig()
    retrieval: RetrievalConfig | None = None  # a model without heads needs it
    report: ReportConfig = ReportConfig()
    fit: FitConfig = FitConfig()

    @property
    def learnt_words(self) -> int | None:
        """The size of a vocabulary that is learnt from the training texts, where no teacher brings one."""
        part = self.teacher.encoders.get("text") or self.student.encoders.get("text")
        size = None if part is None else part.params.get("vocab_size")
        return size if isinstance(size, int) else None

    @property
    def students_words(self) -> dict[str, Any]:
        """What the student's vocabulary follows from: sizes, and whether it may have other words than the teacher's."""
        sizes = [part.params["vocab_size"] for part in self.student.encoders.values() if "vocab_size" in part.params]
        own = sizes and self.learnt_words is None and "text" not in self.student.inherit
        return {"vocab_size": sizes} | ({"own_words": True} if own else {})


def one_line(error: Exception) -> str:
    """Return an exception's text on one line."""
    return " ".join(str(error).split())


def shortened(value: Any) -> str:
    """Return a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def complaint(problem: Mapping[str, Any]) -> str:
    """Return what pydantic found wrong in a value, in the words of YAML where pydantic speaks of Python."""
    if problem["type"] == "literal_error" and isinstance(problem["input"], str):
        return nearest(problem["input"], re.findall("'(.*?)'", problem["ctx"]["expected"]))
    return EXPECTED.get(problem["type"], problem["msg"])


MOST_SHOWN = 40  # choices in a message


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return a sentence part listing the choices and, where one is close, the nearest: for error messages."""
    known = sorted(choices)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    close = close or [choice for choice in known if len(word) > 2 and choice.startswith(word)]
    hint = f"did you mean {close[0]!r}? " if close else ""
    more = f" and {len(known) - MOST_SHOWN} more" if len(known) > MOST_SHOWN else ""
    return f"{hint}choices: {', '.join(known[:MOST_SHOWN])}{more}"
