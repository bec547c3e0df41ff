"""One run on Ray, told and tracked: the session, what each stage asks for, bounded tasks, what a person reads, MLflow,
metrics.
"""
