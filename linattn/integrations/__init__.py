"""Other people's models on linattn's arithmetic. Each module needs the library that it is named after."""
