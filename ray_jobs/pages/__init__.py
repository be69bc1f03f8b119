"""The page kit: one stylesheet and the parts that HTML pages share."""
