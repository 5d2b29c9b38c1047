"""Teachers: the contract, how they look at images, and how each kind is built and fetched."""

from mgd_pipeline.teachers.teacher import Teacher, TeacherOutputs

__all__ = ["Teacher", "TeacherOutputs"]
