"""Operations on whole models: patching, choosing what is converted, fusing and warming up."""
