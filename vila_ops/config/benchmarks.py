"""Benchmarks on official files and their prompts: a class for each benchmark, and a YAML file in configs/benchmarks."""

import operator
import re
import string
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from vila_ops.config.base import Config
from vila_ops.config.few_shot import FewShot
from vila_ops.config.secrets import Url

FAILED = Literal["wrong", "left_out"]
"""wrong: a failed item scores as a wrong answer. left_out: it is not counted, and metrics are named NAME_answered."""


class GenerateAnswer(Config):
    """The model writes its answer, greedily."""

    kind: Literal["generate"] = "generate"
    max_new_tokens: PositiveInt
    stop: tuple[str, ...] = ()
    """Texts at which an answer is cut, such as a line end; the end of the turn always ends it."""


class ScoreAnswer(Config):
    """The likeliest continuation is the answer. Only a target that gives likelihoods can be asked."""

    kind: Literal["score"] = "score"
    continuation: str = " {letter}"
    """The text of an option after the prompt, of {letter} and {option}."""
    per_token: bool = False
    """By the mean instead of the sum of the log-likelihoods of its tokens."""


AnswerFormat = Annotated[GenerateAnswer | ScoreAnswer, Field(discriminator="kind")]


class PromptTemplate(Config):
    """How an item is written for a model.

    `user` names parts of the item in braces. {hint} and {options} are written here: the former as it is, the latter
    with one `option` on each line. A line whose parts are all empty for an item is left out.
    """

    format: Literal["chat", "text"] = "chat"
    """chat: turns in the model's chat template. text: one running text after bos, as models before SFT read it."""
    system: str = ""
    """Text of a system turn; empty: the chat template's own."""
    user: str
    hint: str = ""
    """What tells the model the form of its answer."""
    option: str = "{letter}. {option}"
    letters: str = string.ascii_uppercase
    """Letters of the options, in order."""
    answer: AnswerFormat

    def fields(self) -> list[str]:
        """The parts that `user` names, in order."""
        return re.findall(r"{(\w+)}", self.user)

    @model_validator(mode="after")
    def _the_hint_is_written(self) -> "PromptTemplate":
        if bool(self.hint) != ("hint" in self.fields()):
            raise ValueError(
                f"the prompt has the hint {self.hint!r} and the user's text {self.user!r}; write {{hint}} there if "
                f"there is a hint, and only then"
            )
        return self


class OfficialBenchmark(Config):
    """Base of benchmarks on official files, which lie in `resources.storage.benchmarks`/KIND."""

    prompt: PromptTemplate
    few_shot: FewShot | None = Field(default=None, exclude_if=operator.not_)
    """Demonstrations before each item, written as the prompt says; None: none."""
    failed_items: FAILED = "wrong"
    """How items count that have no answer: refused, timed out, too long, or with an image that cannot be read."""
    first: PositiveInt | None = None
    """Only so many of the first items; None: all."""

    @field_validator("few_shot")
    @classmethod
    def _no_shots_are_none(cls, few_shot: FewShot | None) -> FewShot | None:
        return few_shot if few_shot and few_shot.shots else None

    @model_validator(mode="after")
    def _the_prompt_takes_demonstrations(self) -> "OfficialBenchmark":
        if self.few_shot is None:
            return self
        if "examples" in self.prompt.fields():
            raise ValueError(
                "the prompt shows {examples}, the benchmark's own demonstrations; remove few_shot, or name another part"
            )
        answer = self.prompt.answer
        if self.prompt.format == "text" and isinstance(answer, GenerateAnswer) and not answer.stop:
            raise ValueError(
                "few_shot as running text needs a stop rule, or an answer goes on with another demonstration; set "
                'prompt.answer.stop, such as ["\\n"]'
            )
        return self


class Pope(OfficialBenchmark):
    """POPE on COCO's val2014: is there a X in the image; random, popular and adversarial choices of X."""

    kind: Literal["pope"] = "pope"
    version: Literal["e3e3926", "109985c"] | None = "e3e3926"
    """Commit of the question files: LLaVA and VILA report the former, with 2,910 random questions; the latter has
    3,000. None: your own questions."""


class SeedBench(OfficialBenchmark):
    """SEED-Bench: choice among four answers about an image, or about the middle frame of a video."""

    kind: Literal["seed_bench"] = "seed_bench"
    subset: Literal["image", "total"] = "image"
    """image: 14,233 questions on images. total: 5,009 on videos too, as LLaVA and VILA report. Two metrics."""


class Ai2d(OfficialBenchmark):
    """AI2D: choice among answers about a diagram of a school book."""

    kind: Literal["ai2d"] = "ai2d"
    labels: Literal["masked", "shown"] = "masked"
    """masked: letters cover the texts that are answers (AI2D_TEST.tsv). shown: AI2D_TEST_NO_MASK.tsv, far easier."""


class Mmmu(OfficialBenchmark):
    """MMMU: questions of college exams with up to seven images, by choice or open; `prompt` is that of the former."""

    kind: Literal["mmmu"] = "mmmu"
    split: Literal["dev", "validation"] = "validation"
    open_prompt: PromptTemplate
    """The prompt of questions without options."""


class ChartQa(OfficialBenchmark):
    """ChartQA: short answers about charts; half of the questions are written by people, half made of captions."""

    kind: Literal["chartqa"] = "chartqa"
    split: Literal["val", "test"] = "test"


class DocVqa(OfficialBenchmark):
    """DocVQA, task 1: short answers about the page of a document. The test split is scored by its server alone."""

    kind: Literal["docvqa"] = "docvqa"
    split: Literal["val", "test"] = "val"


CaptionTokenizer = Literal["ptb", "ptb_python"]
"""ptb: the official one, a program in Java. ptb_python: ours, which differs on 24 of 105,021 sentences."""


class Captions(OfficialBenchmark):
    """Base of captions on the split of Karpathy, by CIDEr-D, BLEU-4 and ROUGE-L."""

    split: Literal["val", "test"] = "test"
    tokenizers: tuple[CaptionTokenizer, ...] = Field(default=("ptb", "ptb_python"), min_length=1)
    """Each gives metrics of its own, with its name."""


class CocoCaptions(Captions):
    """Captions of COCO."""

    kind: Literal["coco_captions"] = "coco_captions"


class Flickr30kCaptions(Captions):
    """Captions of Flickr30k."""

    kind: Literal["flickr30k_captions"] = "flickr30k_captions"


class Judge(Config):
    """A model behind an OpenAI-compatible API that grades answers. All of it but the URL is in the metrics' names."""

    url: Url
    """Base of its routes, such as http://127.0.0.1:8000/v1."""
    model: str
    revision: str = ""
    """What tells models of one name apart, such as a date: replies of another revision are not reused."""
    temperature: float = Field(ge=0)
    max_new_tokens: PositiveInt
    system: str = ""
    """Text of a system turn. The rest of the prompt is among the official files."""


class JudgedBenchmark(OfficialBenchmark):
    """Base of benchmarks whose answers a judge grades."""

    judge: Judge | None = None
    """None: no scores, only the file of answers that the official script reads."""


class LlavaBench(JudgedBenchmark):
    """LLaVA-Bench (in the Wild): long answers, which a judge compares with those of a reference model."""

    kind: Literal["llava_bench"] = "llava_bench"


class MmVet(JudgedBenchmark):
    """MM-Vet: open answers that combine capabilities, which a judge grades from 0 to 1."""

    kind: Literal["mm_vet"] = "mm_vet"


class Mmlu(OfficialBenchmark):
    """MMLU: choice among four answers in 57 subjects, text only."""

    kind: Literal["mmlu"] = "mmlu"
    shots: int = Field(default=5, ge=0, le=5)
    """Questions of the subject's dev file before each question, in the official text."""


class Bbh(OfficialBenchmark):
    """BIG-Bench Hard: 23 tasks of reasoning, text only, after three worked examples."""

    kind: Literal["bbh"] = "bbh"
    style: Literal["direct", "chain_of_thought"] = "direct"
    """Whether the examples show the answer alone, or the steps to it. Two metrics."""


class DropQuestions(OfficialBenchmark):
    """DROP: numbers, dates and spans that follow from a passage, text only."""

    kind: Literal["drop"] = "drop"
    shots: int = Field(default=3, ge=0)
    """Questions of the train file before each question: its first ones."""


class VqaV2(OfficialBenchmark):
    """VQAv2: open questions on COCO's images; accuracy by ten human answers."""

    kind: Literal["vqav2"] = "vqav2"
    split: Literal["val2014", "test-dev2015", "test2015"] = "val2014"
    """The test splits give an upload file and no number: only the server has their answers."""


class OkVqa(OfficialBenchmark):
    """OK-VQA: questions on COCO's images that need knowledge."""

    kind: Literal["okvqa"] = "okvqa"
    spacy_pipeline: str | None = None
    """An installed pipeline of spaCy, such as en_core_web_sm, for the metric of lemmatised answers; None: without."""


class Gqa(OfficialBenchmark):
    """GQA: compositional questions on images of Visual Genome."""

    kind: Literal["gqa"] = "gqa"
    split: Literal["testdev_balanced", "val_balanced"] = "testdev_balanced"


class VizWiz(OfficialBenchmark):
    """VizWiz: questions of blind people on their own photos."""

    kind: Literal["vizwiz"] = "vizwiz"
    split: Literal["val", "test"] = "val"
    """test gives an upload file and no number: only the server has its answers."""


class TextVqa(OfficialBenchmark):
    """TextVQA: questions on images whose text has to be read. With {ocr} in the prompt it is another metric."""

    kind: Literal["textvqa"] = "textvqa"
    split: Literal["val", "test"] = "val"
    """test gives an upload file and no number: only the server has its answers."""


class ScienceQa(OfficialBenchmark):
    """ScienceQA: school questions with options, on the split test."""

    kind: Literal["scienceqa"] = "scienceqa"
    subset: Literal["image", "all"] = "image"
    """image: only the questions with an image, as LLaVA and VILA report them."""


class Mme(OfficialBenchmark):
    """MME: two questions of yes or no on each image; perception (ten subtasks) and cognition (four)."""

    kind: Literal["mme"] = "mme"


class MmBench(OfficialBenchmark):
    """MMBench: questions with up to four options, right only if they are in every order of these."""

    kind: Literal["mmbench"] = "mmbench"
    version: Literal["dev_20230712", "dev_v11", "test_v11"] = "dev_20230712"
    """Of the file; part of the metric's name. LLaVA and VILA report the first."""


class MmBenchCn(OfficialBenchmark):
    """MMBench-CN: MMBench in Chinese."""

    kind: Literal["mmbench_cn"] = "mmbench_cn"
    version: Literal["dev_20231003", "dev_v11", "test_v11"] = "dev_20231003"
    """Of the file; part of the metric's name. LLaVA and VILA report the first."""


Official = (
    Pope
    | SeedBench
    | Ai2d
    | Mmmu
    | ChartQa
    | DocVqa
    | CocoCaptions
    | Flickr30kCaptions
    | LlavaBench
    | MmVet
    | Mmlu
    | Bbh
    | DropQuestions
    | VqaV2
    | OkVqa
    | Gqa
    | VizWiz
    | TextVqa
    | ScienceQa
    | Mme
    | MmBench
    | MmBenchCn
)
"""A benchmark on official files."""
