class ProgramEngine: pass
