"""The search for a recipe: many short trainings over the teacher caches of one project, and one honest comparison."""
