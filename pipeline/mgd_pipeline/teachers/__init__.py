"""Teachers: what they are, how each kind is built, fetched and run."""

from mgd_pipeline.teachers.teacher import Teacher, TeacherOutputs

__all__ = ["Teacher", "TeacherOutputs"]
