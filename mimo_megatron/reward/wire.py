"""The JSON that crosses the wire, as pydantic models: of the reward service, and of the reward models behind it.

``POST /v1/score`` takes a ``ScoreRequest`` and answers a ``ScoreResponse``; ``POST /v1/cancel`` takes a
``CancelRequest``. A reward model's replica answers ``POST /v1/rewards`` (``ModelRequest`` -> ``ModelResponse``).
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from mimo_megatron.config.rl import RewardTask
from mimo_megatron.reward.verdict import Reason, Status

Task = RewardTask  # by the name that this format has for it
MAX_BODY_BYTES = 8 << 20
MAX_ITEM_BYTES = 256 << 10
MAX_ITEMS = 1024
MAX_IMAGES = 64
"""Of one chat."""

Id = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Side = Annotated[int, Field(ge=1, le=100_000)]


class Wire(BaseModel):
    """Frozen; an unknown key is refused, numbers must be finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ImageMeta(Wire):
    """The picture a question is about. Golds are in pixels of the stored picture, answers in those of the shown one."""

    sha256: Sha256 | None = None
    size: tuple[Side, Side]
    """(width, height) of the stored picture."""
    shown: tuple[Side, Side]
    """(width, height) after smart resize: what the model saw."""


class Message(Wire):
    """One turn of the chat before the response. An image stands as a part ``{"type": "image", "image": SHA-256}``."""

    role: Literal["system", "user", "assistant"]
    content: str | list[dict[str, str]]


def chat_problem(messages: Sequence[Message]) -> str:
    """Why no reward model can judge an answer to this chat; empty where one can."""
    if not messages or messages[-1].role != "user":
        return "messages must end with the user's turn"
    kinds = {"text": {"type", "text"}, "image": {"type", "image"}}
    parts = [part for one in messages if not isinstance(one.content, str) for part in one.content]
    if any(kinds.get(part.get("type", "")) != set(part) for part in parts):
        return "a part is text, or an image named by its SHA-256"
    if (num_images := sum(part["type"] == "image" for part in parts)) > MAX_IMAGES:
        return f"messages hold {num_images} images, at most {MAX_IMAGES}"
    return ""


def image_names(messages: Sequence[Message]) -> list[str]:
    """What the image parts of a chat say, in order."""
    parts = [part for one in messages if not isinstance(one.content, str) for part in one.content]
    return [part.get("image", "") for part in parts if part.get("type") == "image"]


class Meta(Wire):
    """What a rule may need besides response and gold."""

    thinking: Literal["auto", "required"] = "auto"
    """``required``: no ``</think>``, no answer. ``auto``: without either think tag all text is the answer."""
    bare_answer: bool = False
    r"""Of math and count tasks: a final answer without any ``\boxed{}`` is judged whole, for questions that are
    answered with nothing but the number. Otherwise a box is required."""
    finish_reason: Literal["stop", "length"] = "stop"
    image: ImageMeta | None = None
    """Of box, point and gui tasks; for several pictures, the one that is asked about."""
    box_mode: Literal["relu", "linear", "iou", "threshold"] = "relu"
    all_boxes: bool = False
    """Of box tasks: the question asks for all boxes, however many. Otherwise a gold of one box asks for one."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
    duration_seconds: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Of the video, for time tasks."""
    units: list[Annotated[str, StringConstraints(max_length=40)]] = []
    """Words that may follow a count."""
    messages: list[Message] = []
    """The chat that the response answers, for reward models."""
    prompt: str = ""
    """For people: what was asked."""


class ScoreItem(Wire):
    id: Id
    task: Task
    response: str
    gold: Any = None
    """By task: math a string or list of strings; box ``[[x1, y1, x2, y2], ...]``; point the box it must fall into;
    count a whole number; time ``"[mm:ss, mm:ss]"`` or ``[start, end]`` in seconds; gui an action
    with a box in place of each point; models none."""
    meta: Meta = Meta()


class ScoreRequest(Wire):
    batch_id: Id
    items: Annotated[list[ScoreItem], Field(min_length=1, max_length=MAX_ITEMS)]
    deadline_ms: Annotated[int, Field(ge=1, le=600_000)] | None = None
    """Whatever has no verdict by then is answered ``unknown``, reason ``deadline``."""


class ScoreResult(Wire):
    id: Id
    status: Status
    reward: Annotated[float, Field(ge=0, le=1)] | None
    reason: Reason
    parts: dict[str, float] = {}
    answer: str = ""
    ms: float
    """From arrival to verdict."""


class ScoreResponse(Wire):
    batch_id: Id
    reward_version: str
    """Changes when any rule, limit or reward model changes; verdicts of one version are comparable."""
    results: list[ScoreResult]
    """In the order of the items."""


class CancelRequest(Wire):
    batch_id: Id | None = None
    ids: Annotated[list[Id], Field(max_length=MAX_ITEMS)] = []


class CancelResponse(Wire):
    cancelled: int


class ModelItem(Wire):
    """One chat with its answer; pictures are named by SHA-256 in ``messages`` and read from the replica's own root."""

    id: Id
    messages: list[Message]
    response: str


class ModelRequest(Wire):
    items: Annotated[list[ModelItem], Field(min_length=1, max_length=256)]


class ModelResult(Wire):
    id: Id
    score: float | None
    """The model's raw output; None with a reason where the item cannot be scored."""
    reward: Annotated[float, Field(ge=0, le=1)] | None
    """sigmoid((score - mu) / tau), with mu and tau of the model's manifest."""
    reason: Reason


class ModelResponse(Wire):
    model_version: str
    results: list[ModelResult]
