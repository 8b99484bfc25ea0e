"""What an agent may ask of the workbench, as functions and as LangChain tools."""
