"""The schema of a recipe's ``data``: where rows come from, what columns mean, how they are changed in training."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Strict(BaseModel):
    """A section whose unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Part(BaseModel):
    """A registry entry: its ``type`` and the parameters of the builder that the type names."""

    model_config = ConfigDict(extra="allow", frozen=True)
    type: str

    @property
    def params(self) -> dict[str, Any]:
        """The builder's keyword arguments."""
        return dict(self.model_extra or {})


class RandAugment(Strict):
    """Operations drawn for each image from a list of fourteen: see distill/data/randaugment.py."""

    ops: int = Field(2, ge=1, le=14)  # one after the other
    magnitude: float = Field(9.0, ge=0, le=30)  # of each, on the paper's scale; 30 turns by 30 degrees


class ImageAugment(Strict):
    """Replayable image augmentation of uint8 images at working size."""

    flip: float = Field(0.0, ge=0, le=1)  # probability of a horizontal flip
    shift: int = Field(0, ge=0)  # largest translation, pixels
    fill: Literal["white", "black"] = "white"  # what a shift, a rotation or RandAugment uncovers
    crop: float = Field(1.0, gt=0, le=1)  # least share of the area that a random resized crop keeps; 1 crops nothing
    brightness: float = Field(0.0, ge=0, le=1)  # largest relative change
    contrast: float = Field(0.0, ge=0, le=1)  # largest relative change
    rotate: float = Field(0.0, ge=0, le=180)  # largest angle, degrees, either way
    randaugment: RandAugment | None = None  # {}: its defaults
    saturation: float = Field(0.0, ge=0, le=1)  # largest relative change
    hue: float = Field(0.0, ge=0, le=0.5)  # largest turn, share of the colour circle
    erase: float = Field(0.0, ge=0, le=1)  # probability that a box of random size and place is filled with noise


class TextAugment(Strict):
    """Replayable text augmentation."""

    word_dropout: float = Field(0.0, ge=0, lt=1)  # probability of dropping a word; one word always stays
    views: int | None = Field(None, ge=1)  # after so many views words drop as before, so that a frozen tower repeats


class AudioAugment(Strict):
    """Replayable augmentation of sounds; the teacher hears what the student hears."""

    shift: float = Field(0.0, ge=0, lt=1)  # largest shift in time, share of the whole; silence follows
    gain: float = Field(0.0, ge=0)  # largest change of loudness, decibels
    noise: float = Field(0.0, ge=0, lt=1)  # largest amplitude of white noise, share of the sound's own
    time_mask: float = Field(0.0, ge=0, lt=1)  # longest stretch that falls silent, share of the sound
    band_mask: float = Field(0.0, ge=0, lt=1)  # widest band that is taken out, share of the mel scale


class SeriesAugment(Strict):
    """Replayable augmentation of series, after they are standardised."""

    jitter: float = Field(0.0, ge=0)  # standard deviation of noise that is added to each number
    scale: float = Field(0.0, ge=0, lt=1)  # largest relative change of a channel
    window: float = Field(1.0, gt=0, le=1)  # least share of the steps that a random window keeps, stretched to all


class TabularAugment(Strict):
    """Replayable augmentation of records."""

    drop: float = Field(0.0, ge=0, lt=1)  # probability that a column's value counts as missing


class AugmentConfig(Strict):
    """Augmentation a modality: a pure function of (seed, row id, view)."""

    image: ImageAugment = ImageAugment()
    video: ImageAugment = ImageAugment()  # the same change of all frames
    text: TextAugment = TextAugment()
    audio: AudioAugment = AudioAugment()
    series: SeriesAugment = SeriesAugment()
    tabular: TabularAugment = TabularAugment()


class AudioConfig(Strict):
    """What sounds are brought to; teachers of one rate need that rate."""

    sample_rate: int = Field(16_000, ge=2_000, le=96_000)  # hertz
    seconds: float = Field(2.0, gt=0, le=60)  # longer sounds are cut, shorter ones know their length


class VideoConfig(Strict):
    """What clips are brought to; their size is ``working_size``."""

    frames: int = Field(8, ge=1, le=64)


class SeriesConfig(Strict):
    """What series are brought to."""

    channels: int = Field(1, ge=1, le=4096)  # numbers a step
    steps: int = Field(128, ge=1, le=2**16)  # longer series are cut, shorter ones know their length


class TabularConfig(Strict):
    """What columns of records hold."""

    categories: list[str] = []  # columns whose values are names; all others are numbers
    max_categories: int = Field(64, ge=1, le=2**16)  # a column's most frequent values, beside "another or none"


class LabelledConfig(Strict):
    """Which training rows keep their labels, for experiments on few of them; chosen by a hash of seed and group."""

    groups: float = Field(1.0, gt=0, le=1)  # about that share of the groups (of the rows, without a group column)
    rows: int | None = Field(None, ge=1)  # that many rows of these: whole groups, but for the last one


class RandomSplitConfig(Strict):
    """Shares of the groups (of the rows, without a group column) that are valid's and test's; the rest is train's."""

    valid: float = Field(0.1, gt=0, lt=1)
    test: float = Field(0.2, gt=0, lt=1)

    @model_validator(mode="after")
    def _leave_some(self) -> RandomSplitConfig:
        if self.valid + self.test >= 1:
            raise ValueError(
                f"valid and test take {self.valid + self.test:g} of the rows together; leave some to train"
            )
        return self


class TargetConfig(Strict):
    """What a task's targets are; a word in a recipe means a column with one class a row."""

    column: str | list[str]  # several of "multilabel" hold 0 or 1, several of "regression" a number each
    kind: Literal["classification", "multilabel", "regression", "captioning"] = "classification"
    separator: str = Field(";", min_length=1)  # between the labels in a text; a column of lists needs none
    vocab_size: int = Field(4000, ge=8)  # most tokens of captions, learnt from those of training rows
    max_length: int = Field(16, ge=2, le=512)  # tokens that a caption is cut to, the closing one included

    @model_validator(mode="after")
    def _several_columns(self) -> TargetConfig:
        if self.kind in ("classification", "captioning") and not isinstance(self.column, str):
            raise ValueError(f"column is a list; {self.kind} has one, several need kind multilabel or regression")
        if not self.columns or len(set(self.columns)) < len(self.columns):
            raise ValueError("column names none, or one twice")
        return self

    @property
    def columns(self) -> list[str]:
        """The columns that are read."""
        return [self.column] if isinstance(self.column, str) else list(self.column)


class DataConfig(Strict):
    """Where rows come from and what their columns mean."""

    source: Part
    modalities: dict[str, str | list[str]] = Field(min_length=1)  # modality -> column; those of "tabular" are a list
    targets: dict[str, TargetConfig] = {}  # task -> its column; a training row may have none of them
    labelled: LabelledConfig | None = None  # hides the labels of other training rows; a number means its ``groups``
    split: str = "split"  # column holding train / valid / test
    random_split: RandomSplitConfig | None = None  # of rows that have no such column
    group: str | None = None  # column whose values stay together in bootstrap intervals
    id: str | None = None  # column of stable integer ids; row numbers where absent
    hold_out: float = Field(0.0, ge=0, lt=1)  # share of train's groups that are valid's, where the source has no valid
    working_size: int = Field(64, ge=8, le=1024)  # pixels; every image and frame is resized to it before augmentation
    image_fit: Literal["pad", "crop"] = (
        "pad"  # an image that is no square is padded with white, or its centre is cut out
    )
    decode_once: bool = True  # keep decoded images, sounds and clips on disk; false: decode them in each epoch
    audio: AudioConfig = AudioConfig()
    video: VideoConfig = VideoConfig()
    series: SeriesConfig = SeriesConfig()
    tabular: TabularConfig = TabularConfig()
    two_level_order: int = Field(10**8, ge=1)  # training rows above which an epoch's order is blocks, then windows
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    augment: AugmentConfig = AugmentConfig()

    @field_validator("targets", mode="before", json_schema_input_type=dict[str, str | TargetConfig])
    @classmethod
    def _columns_of_classes(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {task: {"column": given} if isinstance(given, str) else given for task, given in value.items()}

    @field_validator("labelled", mode="before", json_schema_input_type=float | LabelledConfig | None)
    @classmethod
    def _share_of_groups(cls, value: Any) -> Any:
        return {"groups": value} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _name_columns(self) -> DataConfig:
        for name, columns in self.modalities.items():
            if name != "tabular" and not isinstance(columns, str):
                raise ValueError(f"modalities.{name} is a list; it is one column, and only tabular has several")
        names = self.columns("tabular")
        if len(set(names)) < len(names):
            raise ValueError("modalities.tabular names a column twice")
        for name in self.tabular.categories:
            if name not in names:
                raise ValueError(f"tabular.categories names {name!r}, which modalities.tabular does not; add it there")
        return self

    def columns(self, modality: str) -> list[str]:
        """The columns of a modality; none of one that the data lacks."""
        found = self.modalities.get(modality, [])
        return [found] if isinstance(found, str) else list(found)
