"""What a run tells about itself: numbered records, the files they go to, and what a person sees of them."""
