"""Evaluation: which evaluator a dataset gets (`build`), and the comparison of trained models (`report`)."""
