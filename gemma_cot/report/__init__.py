"""What a run did, in one HTML file: gather · diagnosis · panels · microscope · sections · page."""
