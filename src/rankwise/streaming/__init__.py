"""The stages of a run, `rankwise.stages`, for a model that is larger than the machine: block by block."""

from rankwise.streaming.decomposition import KeptMoments, decompose_all
from rankwise.streaming.narrowing import OnDisk
from rankwise.streaming.refinement import refine
from rankwise.streaming.result import factorise
from rankwise.streaming.stream import start
from rankwise.streaming.student import measure, student_of

__all__ = ["KeptMoments", "OnDisk", "decompose_all", "factorise", "measure", "refine", "start", "student_of"]
