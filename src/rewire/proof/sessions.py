"""What models that follow objects through videos remember between frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KNOWN, FRAME = 0, 1
"""The frame in which objects are known already, and the one that is looked at."""

SURE, FRAMES_ALIVE = 0.9, 30
"""How sure a session is of an object, and for how many frames it keeps one that it no longer finds."""


@dataclass(frozen=True, eq=False, repr=False)
class VideoSession:
    """A session as its data, from which it is made anew before each forward: forward changes it.

    Attributes:
        make: the class of the session.
        frames: the video, (frames, channels, height, width).
        memory: what is remembered of frame `KNOWN`, for each object in the first dimension.
        points: clicks on frame `FRAME` in pixels, (objects, points, 2).
        words: tokens that say what else to look for, (1, length), for models that take words.
    """

    make: Callable[..., Any]
    frames: Tensor
    memory: Mapping[str, Tensor]
    points: Tensor
    words: Tensor | None = None

    def fresh(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The session, its numbers on `device` and of type `dtype`."""
        height, width = self.frames.shape[-2:]
        places = {f"{name}_device": device for name in ("inference", "inference_state", "video_storage")}
        session = self.make(self.frames.to(dtype), height, width, dtype=dtype, **places)
        if self.words is not None:
            prompt = session.add_prompt("words")
            session.prompt_input_ids[prompt] = self.words.to(device)
            session.prompt_attention_masks[prompt] = torch.ones_like(self.words, device=device)
        for number in range(len(self.points)):
            self._follow(session, number, device, dtype)
        return session

    def changes(self, session: Any) -> dict[str, Tensor]:
        """What forward remembers of frame `FRAME`, by object and name; half precision is rounded, so left out."""
        return {
            f"{number}.{name}": value
            for number, stores in session.output_dict_per_obj.items()
            for name, value in stores["non_cond_frame_outputs"].get(FRAME, {}).items()
            if isinstance(value, Tensor) and value.dtype == session.dtype
        }

    def _follow(self, session: Any, number: int, device: torch.device, dtype: torch.dtype) -> None:
        """Adds an object that was seen before and, where the session takes clicks, gets one now."""
        index = session.obj_id_to_idx(number)
        remembered = {name: value[number].to(device, dtype) for name, value in self.memory.items()}
        session.store_output(index, KNOWN, output_value=remembered)
        session.frames_tracked_per_obj[index][FRAME] = {"reverse": False}
        if self.words is not None:
            _found_by_words(session, number)
            return
        clicks = self.points[number].to(device, dtype)[None, None]
        labels = torch.ones(clicks.shape[:-1], dtype=torch.int32)
        session.add_point_inputs(index, FRAME, {"point_coords": clicks, "point_labels": labels})
        session.obj_with_new_inputs.append(number)


def _found_by_words(session: Any, number: int) -> None:
    """Notes what a session keeps of an object that it found itself."""
    session.obj_with_new_inputs = []
    session.obj_id_to_prompt_id[number] = 0
    session.obj_id_to_score[number] = SURE
    session.obj_first_frame_idx[number] = KNOWN
    session.trk_keep_alive[number] = FRAMES_ALIVE
    session.max_obj_id = number
